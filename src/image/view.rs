//! Views: the files that show one dataset.

use super::arrow::{self, Counts};
use super::extent::{Builder, Image};
use super::{npy, parquet};
use crate::dataset::{Dataset, Span, Table};
use crate::error::{Error, Kind, Result};

/// A file form of a dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// Arrow IPC file, `.arrow`.
    #[default]
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
        Dataset::Written(_) => {}
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
        Dataset::Blob(_) | Dataset::File(_) | Dataset::Written(_) => View::Raw,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use arrow_schema::{DataType, Field, Schema};

    use super::super::testing::{Memory, batches, bytes, table};
    use super::*;
    use crate::dataset::Tensor;

    fn tensor(descr: &str, table: Option<Table>) -> Dataset {
        let data = Span::literal([1; 24].as_slice());
        Dataset::Tensor(Tensor { descr: descr.into(), item_size: 8, shape: vec![3], fortran: false, data, table })
    }

    fn example(data_type: DataType) -> Table {
        let schema = Arc::new(Schema::new(vec![Field::new("c", data_type, false)]));
        let batches = batches(&schema, &[3], 1);
        table(schema, &batches, &Memory::default(), true)
    }

    #[test]
    fn extensions_lead_to_views_and_back() {
        for view in View::ALL {
            match view.extension() {
                Some(extension) => assert_eq!(View::from_extension(extension), Some(view)),
                None => assert_eq!(view, View::Raw),
            }
        }
        assert_eq!(View::from_extension("pickle"), Some(View::Pickle));
        for other in ["", "ARROW", "csv", "arrow.tmp"] {
            assert_eq!(View::from_extension(other), None);
        }
    }

    #[test]
    fn the_listed_view_is_one_that_the_dataset_has() {
        let bytes = Span::literal([1, 2, 3].as_slice());
        let numbers = example(DataType::Float64);
        let intervals = example(DataType::Interval(arrow_schema::IntervalUnit::DayTime));
        for (dataset, views) in [
            (Dataset::Table(numbers.clone()), &[View::Arrow, View::Feather, View::Parquet][..]),
            (Dataset::Table(intervals), &[View::Arrow, View::Feather]),
            (tensor("<f8", Some(numbers.clone())), &[View::Npy, View::Arrow, View::Feather, View::Parquet]),
            (tensor("<f8", None), &[View::Npy]),
            (tensor("str", Some(numbers)), &[View::Arrow, View::Feather, View::Parquet]),
            (Dataset::Pickle(bytes.clone()), &[View::Pickle]),
            (Dataset::Json(serde_json::json!([1])), &[View::Json]),
            (Dataset::Blob(bytes.clone()), &[View::Raw]),
            (Dataset::File(bytes), &[View::Raw]),
        ] {
            assert_eq!(views_of(&dataset), views);
            assert_eq!(listed_view(&dataset), views[0]);
            for view in View::ALL {
                let built = build(&dataset, view, Counts::Skip);
                if views.contains(&view) {
                    assert_eq!(size(&dataset, view).unwrap(), Some(built.unwrap().size()), "{view:?}");
                } else {
                    assert!(built.is_err(), "{view:?}");
                    assert!(size(&dataset, view).is_err(), "{view:?}");
                }
            }
        }
    }

    #[test]
    fn json_is_a_line_of_text() {
        let dataset = Dataset::Json(serde_json::json!({"b": [1, 2.5, null], "a": "é"}));
        let image = build(&dataset, View::Json, Counts::Skip).unwrap();
        assert_eq!(bytes(&image, &Memory::default()), "{\"b\":[1,2.5,null],\"a\":\"é\"}\n".as_bytes());
    }
}
