//! `clean`: removes from the mount what a pipeline left there.
//!
//! With file datasets Kedro never deletes what it saved, so intermediates outlive the run in shared memory.

use super::entries::stripped;
use super::introspect::Facts;
use super::list::{below, local_path};
use crate::error::{Context, Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The paths below the mount of everything that the pipelines in `facts` make; for a folder of partitions, how the
/// names of its files end.
pub fn targets(facts: &Facts, root: &Path, mount: &str, keep_outputs: bool) -> BTreeMap<PathBuf, Option<String>> {
    let mut targets = BTreeMap::new();
    for pipeline in facts.pipelines.values() {
        let read = |name: &str| {
            let mut uses = pipeline.datasets.iter().filter(|(other, _)| stripped(other) == stripped(name));
            uses.any(|(_, dataset)| !dataset.consumers.is_empty())
        };
        for (name, dataset) in &pipeline.datasets {
            if dataset.parameter || dataset.free_input || (keep_outputs && !read(name)) {
                continue;
            }
            let Some(entry) = facts.merged.get(name) else { continue };
            let path = entry.filepath.as_deref().and_then(|path| local_path(path, root));
            if let Some(path) = path.filter(|path| below(path, mount)) {
                targets.insert(path, entry.partitions.clone());
            }
        }
    }
    targets
}

/// Removes a file, or a folder of versions; of a folder of partitions the files whose names end so, and what is empty
/// then. Whether there was anything to remove.
///
/// # Errors
/// The system's, but not that it is gone already.
pub fn remove(path: &Path, partitions: Option<&str>) -> Result<bool> {
    if let Some(suffix) = partitions.filter(|suffix| !suffix.is_empty())
        && path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
    {
        return remove_partitions(path, suffix, 0);
    }
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::new(Error::from(error).kind(), format!("cannot remove {}", path.display()))),
    }
}

/// Other files of the folder may be somebody else's.
fn remove_partitions(folder: &Path, suffix: &str, depth: u32) -> Result<bool> {
    let context = || format!("cannot look into {}", folder.display());
    let (mut removed, mut rest) = (false, false);
    for item in std::fs::read_dir(folder).context(context)? {
        let item = item.context(context)?;
        let is_folder = item.file_type().context(context)?.is_dir();
        if is_folder && depth < 32 {
            removed |= remove_partitions(&item.path(), suffix, depth + 1)?;
        } else if !is_folder && item.file_name().to_string_lossy().ends_with(suffix) {
            removed |= remove(&item.path(), None)?;
        }
        rest |= item.path().symlink_metadata().is_ok();
    }
    if !rest {
        // Somebody may have put something into it meanwhile, and keeps the folder then.
        removed |= std::fs::remove_dir(folder).is_ok();
    }
    Ok(removed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_folders_and_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.arrow");
        assert!(!remove(&file, None).unwrap());
        std::fs::write(&file, "x").unwrap();
        assert!(remove(&file, None).unwrap() && !file.exists());
        std::fs::create_dir_all(file.join("2026/x.arrow")).unwrap();
        assert!(remove(&file, None).unwrap() && !file.exists());
    }

    #[test]
    fn partitions_go_and_the_files_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("parts");
        std::fs::create_dir_all(folder.join("2026/empty")).unwrap();
        for file in ["a.parquet", "theirs.arrow", "2026/b.parquet"] {
            std::fs::write(folder.join(file), "x").unwrap();
        }
        assert!(remove(&folder, Some(".parquet")).unwrap());
        assert!(folder.join("theirs.arrow").exists() && !folder.join("2026").exists());
        assert!(!folder.join("a.parquet").exists());
        assert!(!remove(&folder, Some(".parquet")).unwrap());
        std::fs::remove_file(folder.join("theirs.arrow")).unwrap();
        std::fs::write(folder.join("c"), "x").unwrap();
        assert!(remove(&folder, Some("")).unwrap() && !folder.exists());
    }
}
