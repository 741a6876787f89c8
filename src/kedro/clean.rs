//! `clean`: removes from the mount what a pipeline left there.
//!
//! With file datasets Kedro never deletes what it saved, so intermediates outlive the run in shared memory.

use super::entries::stripped;
use super::introspect::Facts;
use super::list::{below, local_path};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The paths below the mount of everything that the pipelines in `facts` make.
pub fn targets(facts: &Facts, root: &Path, mount: &str, keep_outputs: bool) -> BTreeSet<PathBuf> {
    let mut targets = BTreeSet::new();
    for pipeline in facts.pipelines.values() {
        let read = |name: &str| {
            let mut uses = pipeline.datasets.iter().filter(|(other, _)| stripped(other) == stripped(name));
            uses.any(|(_, dataset)| !dataset.consumers.is_empty())
        };
        for (name, dataset) in &pipeline.datasets {
            if dataset.parameter || dataset.free_input || (keep_outputs && !read(name)) {
                continue;
            }
            let path = facts.merged.get(name).and_then(|entry| entry.filepath.as_deref());
            targets.extend(path.and_then(|path| local_path(path, root)).filter(|path| below(path, mount)));
        }
    }
    targets
}

/// Removes a file, or a folder of versions or partitions. Whether it was there.
///
/// # Errors
/// The system's, but not that it is gone already.
pub fn remove(path: &Path) -> Result<bool> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_folders_and_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.arrow");
        assert!(!remove(&file).unwrap());
        std::fs::write(&file, "x").unwrap();
        assert!(remove(&file).unwrap() && !file.exists());
        std::fs::create_dir_all(file.join("2026/x.arrow")).unwrap();
        assert!(remove(&file).unwrap() && !file.exists());
    }
}
