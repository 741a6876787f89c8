//! Views: the files that show one dataset.

use super::arrow::{self, Counts};
use super::extent::{Builder, Image};
use super::{npy, parquet};
use crate::dataset::{Dataset, Span, Table};
use crate::error::{Error, Kind, Result};

/// A file form of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum View {
    /// Arrow IPC file, `.arrow`.
    Arrow,
    /// The same bytes under the name that pandas uses, `.feather`.
    Feather,
    /// Parquet, `.parquet`.
    Parquet,
    /// numpy array, `.npy`.
    Npy,
    /// Python pickle, `.pkl`.
    Pickle,
    /// JSON text, `.json`.
    Json,
    /// The bytes as they are, under the dataset's own name.
    Raw,
}

impl View {
    /// Every view.
    pub const ALL: [View; 7] =
        [View::Arrow, View::Feather, View::Parquet, View::Npy, View::Pickle, View::Json, View::Raw];

    /// What follows the dataset's name and a dot in the file name; `None` for [`View::Raw`].
    pub fn extension(self) -> Option<&'static str> {
        match self {
            View::Arrow => Some("arrow"),
            View::Feather => Some("feather"),
            View::Parquet => Some("parquet"),
            View::Npy => Some("npy"),
            View::Pickle => Some("pkl"),
            View::Json => Some("json"),
            View::Raw => None,
        }
    }

    /// The view of a file name's extension. Extensions are compared as they are written: `X.ARROW` is a name like any.
    pub fn from_extension(extension: &str) -> Option<View> {
        if extension == "pickle" {
            return Some(View::Pickle);
        }
        View::ALL.into_iter().find(|view| view.extension() == Some(extension))
    }
}

/// The views of a table, the listed one first.
fn views_of_table(table: &Table, views: &mut Vec<View>) {
    views.extend([View::Arrow, View::Feather]);
    if parquet::supports(table).is_ok() {
        views.push(View::Parquet);
    }
}

/// The views that a dataset has, the listed one first.
pub fn views_of(dataset: &Dataset) -> Vec<View> {
    let mut views = Vec::new();
    match dataset {
        Dataset::Table(table) => views_of_table(table, &mut views),
        Dataset::Tensor(tensor) => {
            if npy::supports(tensor) {
                views.push(View::Npy);
            }
            if let Some(table) = &tensor.table {
                views_of_table(table, &mut views);
            }
        }
        Dataset::Pickle(_) => views.push(View::Pickle),
        Dataset::Json(_) => views.push(View::Json),
        Dataset::Blob(_) | Dataset::File(_) => views.push(View::Raw),
    }
    views
}

/// The view that a directory shows of a dataset that no file was written for.
pub fn listed_view(dataset: &Dataset) -> View {
    match dataset {
        Dataset::Table(_) => View::Arrow,
        Dataset::Tensor(tensor) if npy::supports(tensor) || tensor.table.is_none() => View::Npy,
        Dataset::Tensor(_) => View::Arrow,
        Dataset::Pickle(_) => View::Pickle,
        Dataset::Json(_) => View::Json,
        Dataset::Blob(_) | Dataset::File(_) => View::Raw,
    }
}

fn none(view: View) -> Error {
    Error::not_found(match view.extension() {
        Some(extension) => format!("the dataset has no .{extension} view"),
        None => "the dataset has no view without an extension".into(),
    })
}

fn table_of(dataset: &Dataset, view: View) -> Result<&Table> {
    match dataset {
        Dataset::Table(table) => Ok(table),
        Dataset::Tensor(tensor) => tensor.table.as_ref().ok_or_else(|| none(view)),
        _ => Err(none(view)),
    }
}

fn bytes(span: &Span) -> Image {
    let mut file = Builder::new();
    file.span(span.clone());
    file.finish()
}

/// The bytes of one view of a dataset.
///
/// With [`Counts::Skip`] the image has the true size, but null counts that metadata does not tell are written as 0: it
/// is for `stat`, not for readers. Parquet views whose columns need encoding read data and need [`Counts::From`].
///
/// # Errors
/// `NotFound` if the dataset has no such view; `Malformed` where metadata contradicts itself; `Unsupported` where the
/// format lacks a type; what the source says of its blobs.
pub fn build(dataset: &Dataset, view: View, counts: Counts<'_>) -> Result<Image> {
    match (view, dataset) {
        (View::Arrow | View::Feather, _) => arrow::image(table_of(dataset, view)?, counts),
        (View::Parquet, _) => parquet::image(table_of(dataset, view)?, counts),
        (View::Npy, Dataset::Tensor(tensor)) => npy::image(tensor),
        (View::Pickle, Dataset::Pickle(span)) => Ok(bytes(span)),
        (View::Json, Dataset::Json(value)) => {
            let mut text = serde_json::to_vec(value)
                .map_err(|error| Error::new(Kind::Internal, "writing JSON").with_source(error))?;
            text.push(b'\n');
            Ok(bytes(&Span::literal(text)))
        }
        (View::Raw, Dataset::Blob(span) | Dataset::File(span)) => Ok(bytes(span)),
        _ => Err(none(view)),
    }
}

/// The size of a view in bytes, from metadata alone; `None` if that needs the data, as for encoded Parquet.
///
/// # Errors
/// As [`build`].
pub fn size(dataset: &Dataset, view: View) -> Result<Option<u64>> {
    match view {
        View::Parquet => parquet::size(table_of(dataset, view)?),
        _ => Ok(Some(build(dataset, view, Counts::Skip)?.size())),
    }
}
