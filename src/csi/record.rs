//! One small file for each target: what was published there.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attributes::Attributes;
use super::state::{MountKey, State};
use crate::error::{Context, Error, Kind, Result};
use crate::fuse::mountinfo;

/// What was published at a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    pub volume: String,
    /// Where, as the list of mounts shows it.
    pub target: PathBuf,
    /// What was asked for.
    pub attributes: Attributes,
    /// Nothing can be written, be it for the attribute, the pod or the kind of access.
    pub read_only: bool,
    /// The pod's `fsGroup`.
    pub group: Option<u32>,
}

impl Record {
    /// The mount that serves it.
    pub fn key(&self) -> MountKey {
        let Attributes { vineyard, format, .. } = &self.attributes;
        MountKey { vineyard: vineyard.clone(), format: *format, group: self.group }
    }

    /// The directory of that mount which is shown, as the list of mounts tells it.
    pub fn root(&self) -> PathBuf {
        Path::new("/").join(self.attributes.prefix.as_deref().unwrap_or_default())
    }
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// Those of a state folder.
    pub fn of(state: &State) -> Self {
        Records { folder: state.targets() }
    }

    fn file(&self, target: &Path) -> PathBuf {
        self.folder.join(format!("{}.json", mountinfo::digest(target)))
    }

    /// What was published at `target`. A file that cannot be understood counts as none: the list of mounts says enough
    /// to go on.
    pub fn read(&self, target: &Path) -> Option<Record> {
        read(&self.file(target)).filter(|record| record.target == target)
    }

    /// Notes what is about to be published.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record).map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
        let file = self.file(&record.target);
        let new = file.with_extension("new");
        std::fs::create_dir_all(&self.folder)?;
        std::fs::write(&new, text).context(|| format!("cannot write {new:?}"))?;
        std::fs::rename(&new, &file).context(|| format!("cannot write {file:?}"))
    }

    /// Forgets a target.
    ///
    /// # Errors
    /// If the file is there and cannot be removed.
    pub fn remove(&self, target: &Path) -> Result<()> {
        let file = self.file(target);
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(|| format!("cannot remove {file:?}"))
            }
            _ => Ok(()),
        }
    }

    /// All that can be read.
    pub fn all(&self) -> Vec<Record> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
        files.filter_map(|file| read(&file)).collect()
    }
}

fn read(file: &Path) -> Option<Record> {
    match serde_json::from_slice(&std::fs::read(file).ok()?) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!("{file:?} is not to be understood: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::csi::attributes::Format;

    #[test]
    fn records_are_found_again_by_their_targets() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::of(&State::create(folder.path()).unwrap());
        let attributes = Attributes {
            vineyard: "a/b".parse().unwrap(),
            prefix: Some("x/y".into()),
            format: Format::Arrow,
            read_only: false,
            ephemeral: true,
        };
        let record = Record { volume: "v".into(), target: "/t/1".into(), attributes, read_only: true, group: Some(7) };
        assert_eq!(records.read(&record.target), None);
        records.write(&record).unwrap();
        assert_eq!(records.read(&record.target), Some(record.clone()));
        assert_eq!(records.all(), std::slice::from_ref(&record));
        assert_eq!(record.root(), Path::new("/x/y"));
        assert_eq!(record.key().group, Some(7));
        std::fs::write(records.file(&record.target), "{").unwrap();
        assert_eq!(records.read(&record.target), None);
        records.remove(&record.target).unwrap();
        records.remove(&record.target).unwrap();
        assert!(records.all().is_empty());
    }
}
