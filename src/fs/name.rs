//! Names of vineyard and paths of the mount: the two directions, and back without loss.
//!
//! A `/` in a name separates directories. A part that no file can be called is written with `%` escapes: `%00` for NUL,
//! `%25` for `%` where it would be read as an escape, `%2E` for the dots of `.` and `..`, `%2F` alone for an empty part.
//! A part that is too long, or whose file name is taken, is cut and carries `%~` and 16 digits of a hash of the whole
//! name; such a file name leads back to its name only by looking through the names.

use std::hash::{BuildHasher, Hasher};

use crate::error::{Error, Kind, Result};

/// Longest file name, in bytes.
pub const NAME_MAX: usize = 255;
/// What stands before the hash in a shortened file name.
pub const HASH_MARK: &str = "%~";

/// A 64-bit hash that is the same in every process: inode numbers and shortened names are made of it.
pub fn stable_hash(parts: &[&[u8]]) -> u64 {
    // FNV-1a with a final mix: no secret, no dependence on the standard library's version.
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in parts {
        for byte in part.iter().chain(&(part.len() as u64).to_le_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}

/// Turns one part of a name into a file name with `suffix` (an extension with its dot, or nothing) behind it.
pub fn encode_part(part: &str, suffix: &str, whole_name: &str) -> String {
    // That of an empty part is taken.
    if part == "/" {
        return hashed_part("%2F", suffix, whole_name);
    }
    let escaped = if part.is_empty() {
        "%2F".to_owned()
    } else if (part == "." || part == "..") && suffix.is_empty() {
        part.replace('.', "%2E")
    } else if part.contains(['\0', '/']) || decode_escapes(part).is_some() || part.contains(HASH_MARK) {
        part.replace('%', "%25").replace('\0', "%00").replace('/', "%2F")
    } else {
        part.to_owned()
    };
    if escaped.len() + suffix.len() <= NAME_MAX { escaped + suffix } else { hashed_part(&escaped, suffix, whole_name) }
}

/// A file name that is cut to fit and made unique by a hash of the whole name.
pub fn hashed_part(part: &str, suffix: &str, whole_name: &str) -> String {
    let hash = format!("{HASH_MARK}{:016x}", stable_hash(&[whole_name.as_bytes()]));
    let mut keep = part.len().min(NAME_MAX - hash.len() - suffix.len());
    while !part.is_char_boundary(keep) {
        keep -= 1;
    }
    format!("{}{hash}{suffix}", &part[..keep])
}

/// The hash in a shortened file name, and what stands behind it.
pub fn split_hash(component: &str) -> Option<(u64, &str)> {
    let (_, rest) = component.rsplit_once(HASH_MARK)?;
    let digits = rest.get(..16)?;
    Some((u64::from_str_radix(digits, 16).ok()?, &rest[16..]))
}

/// Undoes the escapes; `None` if there are none.
fn decode_escapes(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut found = false;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let replacement = match rest.get(at + 1..at + 3) {
            Some("00") => Some('\0'),
            Some("25") => Some('%'),
            Some("2E") => Some('.'),
            Some("2F") => Some('/'),
            _ => None,
        };
        match replacement {
            Some(c) => {
                found = true;
                out.push(c);
                rest = &rest[at + 3..];
            }
            None => {
                out.push('%');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    found.then_some(out)
}

/// Turns a file name (without extension, if a view's was cut off) back into the part of a name.
pub fn decode_part(component: &str) -> String {
    if component == "%2F" {
        return String::new();
    }
    match decode_escapes(component) {
        // Only what `encode_part` writes is read as escaped: no part contains a slash.
        Some(decoded) if !decoded.contains('/') => decoded,
        _ => component.to_owned(),
    }
}

/// As [`decode_part`], for a file in a directory: the root has those whose names begin with a slash.
pub fn decode_file(directory: &str, component: &str) -> String {
    match decode_escapes(component) {
        Some(decoded) if directory.is_empty() && decoded.len() > 1 && decoded.starts_with('/') => decoded,
        _ => decode_part(component),
    }
}

/// Cuts a name into its directory and its last part. A name that begins with a slash is one part: the directory before
/// that slash would have the root's own name.
pub fn split(name: &str) -> (&str, &str) {
    if name.starts_with('/') { ("", name) } else { name.rsplit_once('/').unwrap_or(("", name)) }
}

/// Where the first part of a name ends, below a prefix (empty, or with a trailing slash), if there are more.
pub fn part_end(name: &str, prefix: &str) -> Option<usize> {
    let rest = name.get(prefix.len()..).unwrap_or_default();
    let is_one_part = prefix.is_empty() && rest.starts_with('/');
    if is_one_part { None } else { rest.find('/').map(|at| prefix.len() + at) }
}

/// A file name from the kernel as text.
///
/// # Errors
/// `Os(EILSEQ)` if it is not UTF-8, which names in vineyard must be; `NameTooLong` past [`NAME_MAX`] bytes.
pub fn component(name: &std::ffi::OsStr) -> Result<&str> {
    let text = name.to_str().ok_or_else(|| {
        Error::new(Kind::Os(libc::EILSEQ), format!("{name:?} is not UTF-8; names in vineyard must be"))
    })?;
    if text.len() > NAME_MAX {
        return Err(Error::new(Kind::NameTooLong, format!("a file name of {} bytes; at most {NAME_MAX}", text.len())));
    }
    Ok(text)
}

/// Joins a directory's name prefix (empty for the root, else without a trailing slash) and a part.
pub fn join(directory: &str, part: &str) -> String {
    if directory.is_empty() { part.to_owned() } else { format!("{directory}/{part}") }
}

/// Hasher for tables whose keys are already hashes.
#[derive(Clone, Copy, Default, Debug)]
pub struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = stable_hash(&[&self.0.to_le_bytes(), bytes]);
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

impl BuildHasher for Identity {
    type Hasher = Identity;
    fn build_hasher(&self) -> Identity {
        Identity(0)
    }
}

/// Whether a name is a directory's or lies below it.
pub fn is_inside(name: &str, directory: &str) -> bool {
    name.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ordinary_names_stay_as_they_are() {
        for part in ["X_train", "iris v2", "ns.out", "100%", "50%3", "ünï", "a\nb", ".hidden", "..."] {
            assert_eq!(encode_part(part, "", part), part);
            assert_eq!(decode_part(part), part);
        }
        assert_eq!(encode_part("x", ".arrow", "x"), "x.arrow");
        assert_eq!(encode_part(".", ".arrow", "."), "..arrow");
    }

    #[test]
    fn impossible_names_are_escaped() {
        assert_eq!(encode_part("", "", "a//b"), "%2F");
        assert_eq!(encode_part("..", "", ".."), "%2E%2E");
        assert_eq!(encode_part("a\0b", "", "a\0b"), "a%00b");
        assert_eq!(encode_part("a%00b", "", "a%00b"), "a%2500b");
    }

    #[test]
    fn names_that_begin_with_a_slash_are_files_of_the_root() {
        for name in ["/", "//", "/x", "/x/y", "/100%"] {
            assert_eq!((split(name), part_end(name, "")), (("", name), None));
            assert!(name == "/" || decode_file("", &encode_part(name, "", name)) == name);
        }
        assert_eq!(split_hash(&encode_part("/", ".npy", "/")), Some((stable_hash(&[b"/"]), ".npy")));
        assert_eq!(decode_file("", &encode_part("", "", "")), "");
        assert_eq!(encode_part("/x/y", ".arrow", "/x/y"), "%2Fx%2Fy.arrow");
        assert_eq!(decode_file("sub", "%2Fx"), "%2Fx");
        assert_eq!((split("a//b"), part_end("a//b", ""), part_end("a//b", "a/")), (("a/", "b"), Some(1), Some(2)));
    }

    #[test]
    fn long_names_carry_their_hash() {
        let long = "é".repeat(200);
        let file = encode_part(&long, ".arrow", &long);
        assert!(file.len() <= NAME_MAX && file.ends_with(".arrow"));
        assert_eq!(split_hash(&file), Some((stable_hash(&[long.as_bytes()]), ".arrow")));
    }

    proptest! {
        #[test]
        fn every_part_comes_back(part in "[a.%025EF\\x00é~/]{0,12}".prop_filter("parts hold no slash", |p| !p.contains('/'))) {
            let file = encode_part(&part, "", &part);
            prop_assert!(!file.is_empty() && file != "." && file != ".." && !file.contains('\0'));
            prop_assert_eq!(decode_part(&file), part);
        }

        #[test]
        fn two_parts_never_share_a_file_name(a in "[.%025E\\x00]{0,6}", b in "[.%025E\\x00]{0,6}") {
            prop_assert_eq!(encode_part(&a, "", &a) == encode_part(&b, "", &b), a == b);
        }
    }
}
