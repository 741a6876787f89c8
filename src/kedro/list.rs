//! `catalog list`: the datasets of each pipeline by kind, and what is there now.

use super::introspect::{Entry, Facts};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Where a dataset lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Below the mount.
    Vineyard,
    /// In the catalog, elsewhere.
    Catalog,
    /// In the memory of the process that runs.
    Memory,
    /// A parameter.
    Parameter,
}

/// A line of the listing.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The dataset.
    pub name: String,
    /// Where it lives.
    pub kind: Place,
    /// Dataset class; `None` in memory.
    #[serde(rename = "type")]
    pub class: Option<String>,
    /// Its path or URL.
    pub path: Option<String>,
    /// The factory that made the entry, if one did.
    pub pattern: Option<String>,
    /// Whether it exists now; `None` if only Kedro could tell (a URL, a database).
    pub exists: Option<bool>,
    /// Rows, where the file tells without being read as a whole.
    pub rows: Option<u64>,
    /// Size of the file or of the files below it.
    pub bytes: Option<u64>,
}

/// The rows of one pipeline, by kind and then name.
pub fn rows(facts: &Facts, pipeline: &str, root: &Path, mount: &str) -> Vec<Row> {
    let Some(pipeline) = facts.pipelines.get(pipeline) else { return Vec::new() };
    let mut rows: Vec<Row> = pipeline
        .datasets
        .iter()
        .map(|(name, dataset)| {
            if dataset.parameter {
                return empty(name, Place::Parameter);
            }
            match facts.merged.get(name) {
                Some(entry) if !entry.in_memory() => filled(name, entry, root, mount),
                Some(entry) => {
                    Row { class: entry.kind.clone(), pattern: entry.pattern.clone(), ..empty(name, Place::Memory) }
                }
                None => empty(name, Place::Memory),
            }
        })
        .collect();
    rows.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    rows
}

fn empty(name: &str, kind: Place) -> Row {
    Row { name: name.into(), kind, class: None, path: None, pattern: None, exists: None, rows: None, bytes: None }
}

fn filled(name: &str, entry: &Entry, root: &Path, mount: &str) -> Row {
    let local = entry.filepath.as_deref().and_then(|path| local_path(path, root));
    let kind = if local.as_deref().is_some_and(|path| below(path, mount)) { Place::Vineyard } else { Place::Catalog };
    let (mut exists, mut rows, mut bytes) = (None, None, None);
    if let Some(path) = &local {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                let size = folder_size(path, 0);
                exists = Some(size.is_some());
                bytes = size;
            }
            Ok(metadata) => {
                exists = Some(true);
                bytes = Some(metadata.len());
                rows = row_count(path);
            }
            Err(_) => exists = Some(false),
        }
    }
    Row {
        name: name.into(),
        kind,
        class: entry.kind.clone(),
        path: local.map(|path| path.display().to_string()).or_else(|| entry.filepath.clone()),
        pattern: entry.pattern.clone(),
        exists,
        rows,
        bytes,
    }
}

/// A path of a catalog as a path of this machine; `None` for other protocols. Relative ones start at the project.
pub fn local_path(path: &str, root: &Path) -> Option<PathBuf> {
    match path.split_once("://") {
        Some(("file" | "local", path)) => Some(root.join(path)),
        Some(_) => None,
        None => Some(root.join(path)),
    }
}

/// Whether a path lies below the mount; by its parts, since asking a mount about itself may wait for it.
pub fn below(path: &Path, mount: &str) -> bool {
    use std::path::Component;
    path.strip_prefix(mount).is_ok_and(|rest| {
        rest.components().all(|part| matches!(part, Component::Normal(_))) && rest.components().next().is_some()
    })
}

/// Bytes of all files below a folder (a versioned or partitioned dataset); `None` if there is no file.
fn folder_size(folder: &Path, depth: u32) -> Option<u64> {
    if depth > 16 {
        return None;
    }
    let mut total = None;
    for item in std::fs::read_dir(folder).ok()?.flatten() {
        let Ok(metadata) = item.metadata() else { continue };
        let size = if metadata.is_dir() { folder_size(&item.path(), depth + 1) } else { Some(metadata.len()) };
        if let Some(size) = size {
            total = Some(total.unwrap_or(0) + size);
        }
    }
    total
}

/// Rows of an Arrow or Parquet file, from its footer (and, for Arrow, the head of each record batch).
pub fn row_count(path: &Path) -> Option<u64> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    let mut tail = [0_u8; 10];
    if length < 12 {
        return None;
    }
    file.seek(SeekFrom::Start(length - 10)).ok()?;
    file.read_exact(&mut tail).ok()?;
    if tail.ends_with(b"ARROW1") {
        return arrow_rows(&mut file, length, &tail);
    }
    if tail.ends_with(b"PAR1") {
        use parquet::file::reader::{FileReader, SerializedFileReader};
        let reader = SerializedFileReader::new(file).ok()?;
        return u64::try_from(reader.metadata().file_metadata().num_rows()).ok();
    }
    None
}

/// "Arrow Columnar Format", IPC file: a footer with a block for each record batch, whose message has its length.
fn arrow_rows(file: &mut std::fs::File, length: u64, tail: &[u8; 10]) -> Option<u64> {
    let read = |file: &mut std::fs::File, offset: u64, size: u64| -> Option<Vec<u8>> {
        // A footer or a batch's head beyond this is not worth a listing.
        if size > 64 << 20 || offset.checked_add(size)? > length {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(size).ok()?];
        file.seek(SeekFrom::Start(offset)).ok()?;
        file.read_exact(&mut bytes).ok()?;
        Some(bytes)
    };
    let size = u64::try_from(i32::from_le_bytes(tail.get(..4)?.try_into().ok()?)).ok()?;
    let footer = read(file, length.checked_sub(10)?.checked_sub(size)?, size)?;
    let footer = arrow_ipc::root_as_footer(&footer).ok()?;
    let mut rows = 0_u64;
    for block in footer.recordBatches()? {
        let offset = u64::try_from(block.offset()).ok()?;
        let message = read(file, offset, u64::try_from(block.metaDataLength()).ok()?)?;
        // A continuation marker and a length, or (before format version 5) the length alone.
        let message = message.get(if message.starts_with(&[0xff; 4]) { 8.. } else { 4.. })?;
        let batch = arrow_ipc::root_as_message(message).ok()?.header_as_record_batch()?;
        rows = rows.checked_add(u64::try_from(batch.length()).ok()?)?;
    }
    Some(rows)
}

/// The rows as a table.
pub fn table(pipeline: &str, rows: &[Row]) -> String {
    let mut text = format!("{pipeline}:\n");
    let mut lines: Vec<[String; 6]> = Vec::new();
    for row in rows {
        let kind = match row.kind {
            Place::Vineyard => "vineyard",
            Place::Catalog => "catalog",
            Place::Memory => "memory",
            Place::Parameter => "parameter",
        };
        let state = match (row.exists, row.kind) {
            (Some(true), _) => row.bytes.map_or_else(|| "exists".to_owned(), bytes),
            (Some(false), _) => "absent".to_owned(),
            (None, Place::Vineyard | Place::Catalog) => "?".to_owned(),
            (None, _) => String::new(),
        };
        lines.push([
            row.name.replace(char::is_control, "?"),
            kind.to_owned(),
            row.class.clone().unwrap_or_default(),
            state,
            row.rows.map_or_else(String::new, |rows| format!("{rows} rows")),
            row.path.clone().unwrap_or_default().replace(char::is_control, "?"),
        ]);
    }
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for line in lines {
        let mut shown = String::from(" ");
        for (cell, width) in line.iter().zip(widths).filter(|(_, width)| *width > 0) {
            let _ = write!(shown, " {cell:width$} ");
        }
        let _ = writeln!(text, "{}", shown.trim_end());
    }
    text
}

/// `1.5 MiB`.
fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn batch(rows: i64) -> arrow_array::RecordBatch {
        let column: arrow_array::ArrayRef = Arc::new(arrow_array::Int64Array::from_iter_values(0..rows));
        arrow_array::RecordBatch::try_from_iter([("a", column)]).unwrap()
    }

    #[test]
    fn rows_come_from_footers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.arrow");
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &batch(1).schema()).unwrap();
        writer.write(&batch(70)).unwrap();
        writer.write(&batch(7)).unwrap();
        writer.finish().unwrap();
        assert_eq!(row_count(&path), Some(77));
        let path = dir.path().join("x.parquet");
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch(1).schema(), None).unwrap();
        writer.write(&batch(42)).unwrap();
        writer.close().unwrap();
        assert_eq!(row_count(&path), Some(42));
    }

    #[test]
    fn broken_files_have_no_rows() {
        let dir = tempfile::tempdir().unwrap();
        for content in [
            &b""[..],
            b"ARROW1",
            b"ARROW1\0\0\xff\xff\xff\x7fARROW1",
            b"ARROW1\0\0\xff\xff\xff\xffARROW1",
            b"aaaaaaaaPAR1",
        ] {
            let path = dir.path().join("x");
            std::fs::write(&path, content).unwrap();
            assert_eq!(row_count(&path), None);
        }
    }

    #[test]
    fn below_goes_by_parts() {
        assert!(below(Path::new("/mnt/v/a/b"), "/mnt/v"));
        assert!(!below(Path::new("/mnt/vx/a"), "/mnt/v"));
        assert!(!below(Path::new("/mnt/v/../x"), "/mnt/v"));
        assert!(!below(Path::new("/mnt/v"), "/mnt/v"));
    }

    #[test]
    fn other_protocols_have_no_local_path() {
        let root = Path::new("/p");
        assert_eq!(local_path("s3://bucket/x", root), None);
        assert_eq!(local_path("data/x", root), Some("/p/data/x".into()));
        assert_eq!(local_path("file:///x", root), Some("/x".into()));
    }
}
