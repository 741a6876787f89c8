//! What a filesystem keeps of a file beside its bytes: owner, mode, times, extended attributes.
//!
//! They are stored with the object as JSON text under one key, so that other clients carry them along unseen.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::vineyard::Meta;

/// Key of the attributes in an object's metadata.
pub const ATTRIBUTES_KEY: &str = "vineyard_fs_attributes_";
/// Most bytes of names and values of extended attributes of one file.
pub const XATTRS_MAX: usize = 64 << 10;

/// Attributes of a file that was written through a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileAttributes {
    /// Permission bits, `0o7777`.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last modification, nanoseconds since the epoch (negative before it).
    pub mtime: Option<i64>,
    /// Last access that was set by hand, likewise.
    pub atime: Option<i64>,
    /// Last change of the content or of these attributes, likewise.
    pub ctime: Option<i64>,
    /// `user.*` attributes, values as bytes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl FileAttributes {
    /// The attributes that an object carries. Unreadable ones count as none: they only describe.
    pub fn of(meta: &Meta) -> Option<FileAttributes> {
        serde_json::from_str(meta.get(ATTRIBUTES_KEY)?.as_str()?).ok()
    }

    /// The JSON text that is stored.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Bytes of all extended attributes, names included.
    pub fn xattrs_size(&self) -> usize {
        self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// A time as nanoseconds since the epoch, clamped to what `i64` holds.
pub fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
    }
}

/// The time of nanoseconds since the epoch.
pub fn from_nanos(nanos: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let attributes = FileAttributes {
            mode: Some(0o640),
            mtime: Some(-5),
            xattrs: [("user.a".to_owned(), vec![0, 255])].into(),
            ..Default::default()
        };
        assert_eq!(serde_json::from_str::<FileAttributes>(&attributes.to_text()).unwrap(), attributes);
        assert_eq!(to_nanos(from_nanos(-5)), -5);
    }
}
