//! `vineyard-fs put`: makes a dataset of a file, as a save through a mount does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueHint;
use indicatif::{HumanBytes, HumanCount, ProgressBar};

use super::store::{self, Conflict, Opened, Place};
use crate::dataset::FileAttributes;
use crate::error::{Context, Error, Kind, Result};
use crate::fs::direct::{Named, memory_file};
use crate::image::View;
use crate::vineyard::Store;

/// Bytes that are copied at a time.
const PIECE: usize = 4 << 20;

/// What `put` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// File to read, `-` for the standard input
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Name of the dataset, or of a file of it; with a slash at the end, the directory to put it in [default: the
    /// name of FILE]
    pub name: Option<String>,
    /// What to do if the name is taken
    #[arg(long, value_enum, default_value_t)]
    pub on_conflict: Conflict,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Saves.
///
/// # Errors
/// If the file cannot be read, the name is taken and may not be replaced, or the store has no room; nothing is left
/// behind then.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open_to_change()?;
    let path = match &arguments.name {
        Some(name) => path_of(&arguments.file, Some(&opened.new_path(name)?))?,
        None => path_of(&arguments.file, None)?,
    };
    let replace = arguments.on_conflict == Conflict::Replace;
    // Asked first to spare the copy; the answer that counts comes when the name is about to be given.
    let taken = if replace { None } else { opened.fs.replaced_by(&path)? };
    let saved = match taken {
        Some(taken) => Err(Error::new(Kind::Exists, format!("{taken:?} exists already"))),
        None => save(arguments, &opened, &path, replace),
    };
    opened.warn();
    match saved {
        Ok(line) => store::print(&line),
        Err(error) if error.kind() == Kind::Exists && arguments.on_conflict == Conflict::Skip => {
            store::print(&format!("{error}: skipped\n"))
        }
        Err(error) => Err(error),
    }
}

fn save(arguments: &Args, opened: &Opened, path: &str, replace: bool) -> Result<String> {
    let began = Instant::now();
    let status = opened.store.status()?;
    let (bytes, attributes) = read(&arguments.file, status.memory_limit)?;
    let size = bytes.metadata()?.len();
    // From here to the end no signal stops it: vineyardd would keep the blobs of a client that is gone.
    store::catch_interrupts()?;
    let spinner = store::progress("storing", None);
    spinner.inc(size);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let named = opened.fs.save(path, &bytes, attributes, replace);
    spinner.finish_and_clear();
    Ok(line(&named?, size, began.elapsed().as_secs_f64()))
}

/// What was made.
fn line(named: &Named, bytes: u64, seconds: f64) -> String {
    let what = named.summary.as_ref().map_or(String::new(), |summary| {
        let rows = summary.rows.map_or(String::new(), |rows| format!(", {} rows", HumanCount(rows)));
        let kind = if summary.listed == View::Raw { "plain file".into() } else { store::type_text(&summary.typename) };
        format!("{kind}{rows}, ")
    });
    format!("{}: {what}{} in {seconds:.2} s\n", store::printable(&named.path), HumanBytes(bytes))
}

/// The path at which a file is put. A name without the extension of a view gets the file's.
fn path_of(file: &Path, name: Option<&str>) -> Result<String> {
    let view = |path: &str| path.rsplit_once('.').and_then(|(_, extension)| View::from_extension(extension));
    let own = file
        .file_name()
        .filter(|_| file != Path::new("-"))
        .map(|own| own.to_str().ok_or_else(|| Error::new(Kind::Invalid, format!("{own:?} is not UTF-8: give a name"))));
    match (name, own.transpose()) {
        (Some(name), Ok(Some(own))) if name.is_empty() || name.ends_with('/') => Ok(format!("{name}{own}")),
        (Some(name), Ok(Some(own))) => Ok(match own.rsplit_once('.') {
            Some((_, extension)) if view(own).is_some() && view(name).is_none() => format!("{name}.{extension}"),
            _ => name.to_owned(),
        }),
        (Some(name), _) if !name.is_empty() && !name.ends_with('/') => Ok(name.to_owned()),
        (None, Ok(Some(own))) => Ok(own.to_owned()),
        (_, Err(error)) => Err(error),
        (_, Ok(None)) => Err(Error::new(Kind::Invalid, "give a name for what is read")),
    }
}

/// Copies the input into a memory file, which nobody else can change or shorten while it is published.
fn read(path: &Path, most: u64) -> Result<(File, FileAttributes)> {
    let user = FileAttributes {
        uid: Some(nix::unistd::getuid().as_raw()),
        gid: Some(nix::unistd::getgid().as_raw()),
        ..Default::default()
    };
    if path == Path::new("-") {
        let bar = store::progress("reading", None);
        let bytes = copy(&mut std::io::stdin().lock(), most, &bar);
        bar.finish_and_clear();
        return Ok((bytes?, user));
    }
    let shown = path.display();
    let mut file = File::open(path).context(|| format!("cannot read {shown}"))?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(Error::new(Kind::IsDirectory, format!("{shown} is a directory")));
    }
    if meta.len() > most {
        return Err(too_large(most));
    }
    let bar = store::progress(&shown.to_string(), Some(meta.len()).filter(|_| meta.is_file()));
    let bytes = copy(&mut file, most, &bar);
    bar.finish_and_clear();
    let attributes = FileAttributes { mode: Some((meta.mode() & 0o777) as u16), ..user };
    Ok((bytes.context(|| format!("reading {shown}"))?, attributes))
}

fn too_large(most: u64) -> Error {
    Error::new(Kind::Full, format!("the file is larger than the whole store of {}", HumanBytes(most)))
}

fn copy(from: &mut dyn Read, most: u64, bar: &ProgressBar) -> Result<File> {
    let mut file = memory_file()?;
    let mut buffer = vec![0; PIECE];
    loop {
        let part = match from.read(&mut buffer) {
            Ok(0) => return Ok(file),
            Ok(n) => buffer.get(..n).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        file.write_all(part)?;
        bar.inc(part.len() as u64);
        if bar.position() > most {
            return Err(too_large(most));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_extension_decides_and_comes_from_the_file_if_the_name_has_none() {
        let path = |file: &str, name: Option<&str>| path_of(Path::new(file), name);
        assert_eq!(path("/data/iris.parquet", None).unwrap(), "iris.parquet");
        assert_eq!(path("/data/iris.parquet", Some("X")).unwrap(), "X.parquet");
        assert_eq!(path("/data/iris.parquet", Some("X.arrow")).unwrap(), "X.arrow");
        assert_eq!(path("iris.parquet", Some("run 1/")).unwrap(), "run 1/iris.parquet");
        assert_eq!(path("m.pickle", Some("v1.2")).unwrap(), "v1.2.pickle");
        assert_eq!(path("report.csv", Some("r")).unwrap(), "r");
        assert_eq!(path("-", Some("x.npy")).unwrap(), "x.npy");
        for (file, name) in [("-", None), ("-", Some("dir/")), ("..", None)] {
            assert_eq!(path(file, name).unwrap_err().kind(), Kind::Invalid);
        }
    }

    #[test]
    fn what_is_larger_than_the_store_is_not_read_to_its_end() {
        let bar = ProgressBar::hidden();
        let error = copy(&mut std::io::repeat(1), 1 << 20, &bar).unwrap_err();
        assert_eq!(error.kind(), Kind::Full);
        assert_eq!(copy(&mut &b"abc"[..], 3, &ProgressBar::hidden()).unwrap().metadata().unwrap().len(), 3);
    }
}
