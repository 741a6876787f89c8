//! The folder that the driver's processes on a node share, below the kubelet's.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attributes::{Format, Instance};
use crate::error::{Context, Result};
use crate::fuse::mountinfo;

/// The folder.
#[derive(Clone, Debug)]
pub struct State {
    folder: PathBuf,
}

/// What distinguishes one mount of a node from another: pods that agree in all of this share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MountKey {
    /// Whose datasets.
    pub vineyard: Instance,
    /// How tables are listed.
    pub format: Format,
    /// Group of all files: a pod's `fsGroup`.
    pub group: Option<u32>,
}

impl MountKey {
    /// Permission bits of directories and of files. Who may use a volume is decided by who may mount it, so without a
    /// group it is open to all users of a pod.
    pub fn modes(&self) -> (u32, u32) {
        if self.group.is_some() { (0o775, 0o664) } else { (0o777, 0o666) }
    }

    /// A name that can be a file's.
    pub fn name(&self) -> String {
        let group = self.group.map_or("any".to_owned(), |group| group.to_string());
        // Names of namespaces have no dots, so no two keys give one name.
        let whole = format!("{}.{}.{}.{group}", self.vineyard.namespace, self.vineyard.name, self.format.as_str());
        if whole.len() <= 200 { whole } else { mountinfo::digest(Path::new(&whole)) }
    }
}

impl State {
    /// A folder, which is made.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn create(folder: &Path) -> Result<Self> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(folder);
        made.context(|| format!("cannot make the folder {folder:?}"))?;
        // As the list of mounts shows it.
        let folder = folder.canonicalize().context(|| format!("cannot find {folder:?}"))?;
        let state = State { folder };
        for part in [state.mounts(), state.targets()] {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(&part);
            made.context(|| format!("cannot make the folder {part:?}"))?;
        }
        Ok(state)
    }

    /// Its path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where mounts are.
    pub fn mounts(&self) -> PathBuf {
        self.folder.join("mounts")
    }

    /// Where one mount is.
    pub fn mount(&self, key: &MountKey) -> PathBuf {
        self.mounts().join(key.name())
    }

    /// Where the files on targets are.
    pub fn targets(&self) -> PathBuf {
        self.folder.join("targets")
    }

    /// Where the mounter listens.
    pub fn mounter_socket(&self) -> PathBuf {
        self.folder.join("mounter.sock")
    }

    /// Where the node plugin holds copies of connections.
    pub fn holder_socket(&self) -> PathBuf {
        self.folder.join("holder.sock")
    }

    /// Removes what is empty: the process that goes last leaves nothing behind.
    pub fn tidy(&self) {
        for folder in [self.mounts(), self.targets(), self.folder.clone()] {
            // Fails where something is left, which is then in use.
            std::fs::remove_dir(folder).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn keys_have_names_of_their_own() {
        let key = |vineyard: &str, format, group| MountKey { vineyard: vineyard.parse().unwrap(), format, group };
        let plain = key("a/b", Format::Arrow, None);
        assert_eq!(plain.name(), "a.b.arrow.any");
        let names: Vec<String> = [
            plain,
            key("a/b", Format::Arrow, Some(5)),
            key("a/b", Format::Parquet, None),
            key("a/b.arrow", Format::Arrow, None),
            key(&format!("a/{}", vec!["x".repeat(60); 4].join(".")), Format::Arrow, None),
        ]
        .iter()
        .map(MountKey::name)
        .collect();
        let unique: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        assert!(names.iter().all(|name| name.len() <= 200));
    }

    #[test]
    fn an_empty_state_is_tidied_away() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::create(&folder.path().join("s")).unwrap();
        std::fs::write(state.targets().join("t"), "").unwrap();
        state.tidy();
        assert!(state.targets().exists() && !state.mounts().exists());
        std::fs::remove_file(state.targets().join("t")).unwrap();
        state.tidy();
        assert!(!state.folder().exists());
    }
}
