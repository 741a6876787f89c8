//! Identifiers of vineyard: objects, blobs, instances, signatures.
//!
//! Source: `src/common/util/uuid.h` of v6d 0.24. Integers are `u64` in messages; in metadata an object id is the text
//! `o` followed by 16 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Id of an object or a blob. Bit 63 tells them apart: set for blobs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub u64);

impl ObjectId {
    /// The id of every blob of no bytes; it has no memory and no descriptor.
    pub const EMPTY_BLOB: ObjectId = ObjectId(0x8000_0000_0000_0000);
    /// No object. As a blob id it would name the store's whole pool, so it is never sent.
    pub const INVALID: ObjectId = ObjectId(u64::MAX);

    /// The blob with this time and sequence number: bits 22 to 62 are milliseconds since 1970, bits 0 to 11 count all ids
    /// that a vineyardd makes, from 0 again after 4095 (`IDGenerator` in `uuid.h`).
    pub fn blob_made(ms: u64, sequence: u64) -> Self {
        ObjectId(1 << 63 | (ms & 0x1ff_ffff_ffff) << 22 | sequence & 0xfff)
    }

    /// An object's id that no other object has: the number that the store gave to this blob of `instance`.
    pub fn object_beside(self, instance: InstanceId) -> Self {
        ObjectId(self.0 & !(1 << 63 | 0x3ff << 12) | (instance.0 & 0x3ff) << 12)
    }

    /// The time at which it was made, in milliseconds since 1970.
    pub fn made_ms(self) -> u64 {
        (self.0 >> 22) & 0x1ff_ffff_ffff
    }

    /// Its number among the ids of its vineyardd, modulo 4096.
    pub fn sequence(self) -> u64 {
        self.0 & 0xfff
    }

    /// True for blobs (memory without metadata).
    pub fn is_blob(self) -> bool {
        self.0 & 0x8000_0000_0000_0000 != 0
    }

    /// True for ids that may be asked for as a blob with bytes.
    pub fn is_stored_blob(self) -> bool {
        self.is_blob() && self != Self::EMPTY_BLOB && self != Self::INVALID
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "o{:016x}", self.0)
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ObjectId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.strip_prefix('o')
            .filter(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .map(ObjectId)
            .ok_or_else(|| Error::malformed(format!("{text:?} is not an object id (o and 16 hexadecimal digits)")))
    }
}

/// Number of a vineyardd in its cluster. A restarted vineyardd has a new one when metadata lives in etcd.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct InstanceId(pub u64);

impl InstanceId {
    /// "Unspecified": objects that span instances carry it.
    pub const UNSPECIFIED: InstanceId = InstanceId(u64::MAX);
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}", self.0)
    }
}

/// A blob as the cluster knows it. Blob ids of two instances may collide, so a blob is named by both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlobKey {
    /// The instance whose memory holds the blob.
    pub instance: InstanceId,
    /// The blob's id there.
    pub id: ObjectId,
}

impl fmt::Display for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.instance)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let id: ObjectId = "oe8808e07ac000004".parse().unwrap();
        assert_eq!(id, ObjectId(0xe880_8e07_ac00_0004));
        assert!(id.is_stored_blob());
        assert_eq!(id.to_string(), "oe8808e07ac000004");
        assert_eq!(ObjectId::blob_made(id.made_ms(), id.sequence()), id);
        assert_eq!((id.made_ms() / 86_400_000 / 365, id.sequence()), (56, 4));
        assert!("o8000000000000000".parse::<ObjectId>().unwrap() == ObjectId::EMPTY_BLOB);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in
            ["", "o", "o123", "s68808e07ac400005", "o68808e07ac40000g", "o+8808e07ac400006", "oe8808e07ac0000045"]
        {
            assert!(text.parse::<ObjectId>().is_err(), "{text}");
        }
        assert!(!ObjectId::INVALID.is_stored_blob());
    }
}
