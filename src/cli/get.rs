//! `vineyard-fs get`: copies a view of a dataset to a file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueHint;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::ProgressBar;
use std::os::unix::fs::PermissionsExt;

use super::store::{self, Opened, Place};
use crate::error::{Context, Error, Kind, Result};
use crate::fs::direct::Named;
use crate::image::{Image, View};
use crate::vineyard::BlobSource;

/// Bytes that are copied, and proved to be the dataset's, at a time.
const PIECE: u64 = 8 << 20;
/// How often a copy starts over because somebody replaced the dataset.
const ATTEMPTS: usize = 3;

/// What `get` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Dataset, by name or by the file name of a view
    pub name: String,
    /// File or folder to write to, `-` for the standard output [default: the view's file name, in this folder]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::AnyPath)]
    pub output: Option<PathBuf>,
    /// Which view [default: by the extension of FILE or NAME, else the listed one]
    #[arg(long, value_parser = view_parser())]
    pub view: Option<View>,
    /// Overwrite FILE
    #[arg(long, short)]
    pub force: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

fn view_parser() -> impl TypedValueParser<Value = View> {
    let names = PossibleValuesParser::new(["arrow", "feather", "parquet", "npy", "pickle", "json", "raw"]);
    names.try_map(|text| match text.as_str() {
        "raw" => Ok(View::Raw),
        other => View::from_extension(other).ok_or("no such view"),
    })
}

/// Copies.
///
/// # Errors
/// If there is no such dataset or view, or the file cannot be written; nothing is left behind then.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open()?;
    if !to_stdout(arguments) {
        // There is a temporary file to be removed.
        store::catch_interrupts()?;
    }
    for _ in 1..ATTEMPTS {
        match copy(arguments, &opened) {
            // Nothing of the output is seen before it is whole, except on the standard output.
            Err(error) if error.kind() == Kind::Stale && !to_stdout(arguments) => {}
            other => return other,
        }
    }
    copy(arguments, &opened)
}

fn to_stdout(arguments: &Args) -> bool {
    arguments.output.as_deref() == Some(Path::new("-"))
}

fn copy(arguments: &Args, opened: &Opened) -> Result<()> {
    let path = opened.path(&arguments.name);
    let named = opened.fs.require(&path)?;
    let view = choose_view(arguments, &named)?;
    if to_stdout(arguments) {
        let image = opened.fs.view_image(&named, view)?;
        let bar = store::progress(&named.name, Some(image.size()));
        let written = pour(&image, &*opened.store, &mut std::io::stdout().lock(), &bar);
        bar.finish_and_clear();
        return written;
    }
    let mut output = match &arguments.output {
        Some(output) => output.clone(),
        None => PathBuf::from(named.file_name(view)),
    };
    if output.is_dir() {
        output.push(named.file_name(view));
    }
    let shown = output.display();
    if !arguments.force && output.symlink_metadata().is_ok() {
        return Err(Error::new(Kind::Exists, format!("{shown} exists already: use --force to overwrite it")));
    }
    let image = opened.fs.view_image(&named, view)?;
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The usual mode of new files; the user's mask is applied to it.
    let mode = std::fs::Permissions::from_mode(0o666);
    let temporary = tempfile::Builder::new().prefix(".vineyard-fs-").permissions(mode).tempfile_in(folder);
    let mut temporary = temporary.context(|| format!("cannot write into {}", folder.display()))?;
    let bar = store::progress(&named.name, Some(image.size()));
    let written = pour(&image, &*opened.store, temporary.as_file_mut(), &bar);
    bar.finish_and_clear();
    written.context(|| format!("copying {:?} to {shown}", named.name))?;
    let kept: Result<File, tempfile::PersistError> =
        if arguments.force { temporary.persist(&output) } else { temporary.persist_noclobber(&output) };
    kept.map(drop).map_err(|error| error.error).context(|| format!("cannot write {shown}"))
}

/// The view that was asked for by option, by the output's extension, or by the name's: a file is not what its own
/// extension says otherwise.
fn choose_view(arguments: &Args, named: &Named) -> Result<View> {
    if let Some(view) = arguments.view {
        return Ok(view);
    }
    let summary = named.shown()?;
    let extension = |path: &Path| path.extension().and_then(|e| e.to_str()).and_then(View::from_extension);
    let wanted = arguments.output.as_deref().and_then(extension);
    match wanted {
        Some(view) if named.view != View::Raw => match summary.view(view) {
            Some(_) => Ok(view),
            None => Err(opened_view_error(named, view)),
        },
        _ => {
            warn_of_extension(arguments, named.view);
            Ok(named.view)
        }
    }
}

/// Tells if the output's extension promises what no view is, such as `.csv`.
fn warn_of_extension(arguments: &Args, view: View) {
    let output = arguments.output.as_deref().filter(|output| !output.is_dir());
    if let (Some(extension), Some(output)) = (view.extension(), output)
        && let Some(other) = output.extension().map(|other| other.to_string_lossy())
        && other.starts_with(|first: char| first.is_ascii_alphabetic())
    {
        let output = store::printable(&output.to_string_lossy());
        eprintln!("vineyard-fs: warning: {output} gets the .{extension} view: there is no .{other} one");
    }
}

fn opened_view_error(named: &Named, view: View) -> Error {
    let extension = view.extension().unwrap_or_default();
    Error::new(
        Kind::NotFound,
        format!("{:?} has no .{extension} view: choose another name for the output, or a view with --view", named.name),
    )
}

/// Copies all bytes of an image; each is proved to be of the object before it is written.
fn pour(image: &Arc<Image>, source: &dyn BlobSource, out: &mut dyn Write, bar: &ProgressBar) -> Result<()> {
    source.prepare(&image.blobs(0..image.size()))?;
    let mut buffer = vec![0; PIECE.min(image.size()) as usize];
    let mut at = 0;
    while at < image.size() {
        store::check_interrupt()?;
        let end = (at + PIECE).min(image.size());
        let piece = buffer.get_mut(..(end - at) as usize).unwrap_or_default();
        image.read(source, at, piece)?;
        source.verify(&image.blobs(at..end))?;
        match out.write_all(piece) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
        bar.inc(end - at);
        at = end;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fs::FileSystem;
    use crate::vineyard::Store;
    use crate::vineyard::fake::{FakeStore, Op};

    fn saved(bytes: &[u8]) -> (Arc<FakeStore>, FileSystem, Named) {
        let store = Arc::new(FakeStore::new(64 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let mut file = crate::fs::direct::memory_file().unwrap();
        file.write_all(bytes).unwrap();
        let named = fs.save("f.bin", &file, Default::default(), false).unwrap();
        (store, fs, named)
    }

    #[test]
    fn all_bytes_arrive_and_none_of_a_recycled_blob() {
        let bytes: Vec<u8> = (0..20u32 << 20).map(|i| (i * 7 + (i >> 12)) as u8).collect();
        let (store, fs, named) = saved(&bytes);
        let image = fs.view_image(&named, View::Raw).unwrap();
        let bar = ProgressBar::hidden();
        let mut out = Vec::new();
        pour(&image, &*store, &mut out, &bar).unwrap();
        assert!(out == bytes && bar.position() == bytes.len() as u64);
        store.fail_next(Op::Verify, 1, Kind::Stale);
        let mut out = Vec::new();
        assert_eq!(pour(&image, &*store, &mut out, &bar).unwrap_err().kind(), Kind::Stale);
        assert!(out.is_empty(), "nothing unproved is written");
    }

    #[test]
    fn a_view_is_chosen_by_option_then_output_then_name() {
        let (_store, _fs, named) = saved(b"text");
        let arguments = |view, output: &str| Args {
            name: "f.bin".into(),
            output: Some(output.into()),
            view,
            force: false,
            place: Place::default(),
        };
        // A plain file goes under any name.
        assert_eq!(choose_view(&arguments(None, "x.parquet"), &named).unwrap(), View::Raw);
        assert_eq!(choose_view(&arguments(Some(View::Npy), "x"), &named).unwrap(), View::Npy);
    }
}
