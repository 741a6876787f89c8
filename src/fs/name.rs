//! Names of vineyard and paths of the mount: the two directions, and back without loss.
//!
//! A `/` in a name separates directories. A part that no file can be called is escaped: `%00` stands for NUL, `%2E` for
//! the dots of `.` and `..`, `%2F` for an empty part, and for each slash of a name that begins with one; a `%` of such a
//! part is `%25`. A part that reads as such an escaped form has its `%` escaped, too. All others are called what they are,
//! whatever `%` they hold: programs write such names themselves, and each file name must be that of one name.
//!
//! A part that is too long, or whose file name is taken, is cut and carries `%~` and 16 digits of a hash of the whole
//! name; such a file name leads back to its name only by looking through the names.

use std::borrow::Cow;
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

/// Where a part of a name stands, which decides what it can be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A file in the root: also a whole name that begins with a slash.
    RootFile,
    /// A directory in the root: never an empty part, since what follows its slash would begin with that.
    RootFolder,
    /// Below a directory.
    Below,
}

impl Place {
    fn admits(self, part: &str) -> bool {
        match self {
            Place::RootFile => !part.contains('/') || (part.len() > 1 && part.starts_with('/')),
            Place::RootFolder => !part.is_empty() && !part.contains('/'),
            Place::Below => !part.contains('/'),
        }
    }

    /// The file name of a part, with `suffix` behind it.
    fn encode(self, part: &str, suffix: &str, whole_name: &str) -> String {
        // The escaped form of a slash is that of an empty part.
        if part == "/" || part.len() + suffix.len() > NAME_MAX {
            return hashed_part(part, suffix, whole_name);
        }
        if can_be_called(part, suffix) && !self.is_escaped(part, suffix) {
            return format!("{part}{suffix}");
        }
        let escaped = escape(part);
        match escaped.len() + suffix.len() {
            ..=NAME_MAX => escaped + suffix,
            _ => hashed_part(part, suffix, whole_name),
        }
    }

    /// The part that a file name, without its suffix, is of: the inverse of [`Place::encode`].
    fn decode(self, stem: &str, suffix: &str) -> String {
        if self.is_escaped(stem, suffix) { unescape(stem) } else { stem.to_owned() }
    }

    /// Whether a file name, without its suffix, is the escaped form of a part: of one that no file can be called, or of one
    /// that is such a form itself.
    fn is_escaped(self, stem: &str, suffix: &str) -> bool {
        let mut form = Cow::Borrowed(stem);
        while form.contains('%') {
            let part = unescape(&form);
            if escape(&part) != form {
                return false;
            }
            if !can_be_called(&part, suffix) {
                return self.admits(&part);
            }
            form = Cow::Owned(part);
        }
        false
    }
}

/// Whether a file can have a part of a name, with a suffix behind it, as its name.
fn can_be_called(part: &str, suffix: &str) -> bool {
    let is_dots = suffix.is_empty() && (part == "." || part == "..");
    !part.is_empty() && !is_dots && !part.contains(['\0', '/'])
}

fn escape(part: &str) -> String {
    match part {
        "" => "%2F".to_owned(),
        "." | ".." => part.replace('.', "%2E"),
        _ => part.replace('%', "%25").replace('\0', "%00").replace('/', "%2F"),
    }
}

/// Undoes [`escape`]; other text with `%` stays as it is.
fn unescape(text: &str) -> String {
    if text == "%2F" {
        return String::new();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let (c, length) = match rest.get(at + 1..at + 3) {
            Some("00") => ('\0', 3),
            Some("25") => ('%', 3),
            Some("2E") => ('.', 3),
            Some("2F") => ('/', 3),
            _ => ('%', 1),
        };
        out.push(c);
        rest = &rest[at + length..];
    }
    out.push_str(rest);
    out
}

/// Turns the last part of a name into a file name with `suffix` (an extension with its dot, or nothing) behind it.
pub fn encode_file(part: &str, suffix: &str, whole_name: &str) -> String {
    let place = if part.len() == whole_name.len() { Place::RootFile } else { Place::Below };
    place.encode(part, suffix, whole_name)
}

/// Turns the last part of a directory's name into its file name.
pub fn encode_folder(part: &str, whole_name: &str) -> String {
    let place = if part.len() == whole_name.len() { Place::RootFolder } else { Place::Below };
    place.encode(part, "", whole_name)
}

/// Turns a file name in a directory, whose `suffix` was cut off, back into the part of a name.
pub fn decode_file(directory: &str, stem: &str, suffix: &str) -> String {
    let place = if directory.is_empty() { Place::RootFile } else { Place::Below };
    place.decode(stem, suffix)
}

/// Turns the file name of a directory in a directory back into the part of a name.
pub fn decode_folder(directory: &str, component: &str) -> String {
    let place = if directory.is_empty() { Place::RootFolder } else { Place::Below };
    place.decode(component, "")
}

/// A file name that is cut to fit and made unique by a hash of the whole name.
pub fn hashed_part(part: &str, suffix: &str, whole_name: &str) -> String {
    let hash = format!("{HASH_MARK}{:016x}", stable_hash(&[whole_name.as_bytes()]));
    let part = part.replace('\0', "%00").replace('/', "%2F");
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

/// What a name in a directory is called, or that directory, when the directory is called `to` in place of `from`.
pub fn moved(name: &str, from: &str, to: &str) -> String {
    format!("{to}{}", name.get(from.len()..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SUFFIXES: [&str; 2] = ["", ".arrow"];

    fn component_of(directory: &str, part: &str, suffix: &str) -> String {
        encode_file(part, suffix, &join(directory, part))
    }

    #[test]
    fn ordinary_names_stay_as_they_are() {
        let parts = ["X_train", "iris v2", "ns.out", "100%", "50%3", "ünï", "a\nb", ".hidden", "...", "k=%41", "%7E"];
        let like_escapes =
            ["50%25", "a%2Fb", "a%252Fb", "%2e", "a%2E", "%2E.", "%25", "q%~0123456789abcdef", "%00%", "é%2F"];
        for part in parts.iter().chain(&like_escapes) {
            for directory in ["", "sub"] {
                assert_eq!(component_of(directory, part, ""), *part);
                assert_eq!(decode_file(directory, part, ""), *part);
                assert_eq!(encode_folder(part, &join(directory, part)), *part);
                assert_eq!(decode_folder(directory, part), *part);
            }
        }
        assert_eq!(encode_file("x", ".arrow", "x"), "x.arrow");
        assert_eq!(encode_file(".", ".arrow", "."), "..arrow");
    }

    #[test]
    fn names_that_no_file_can_have_are_escaped_and_so_is_what_reads_like_them() {
        let forms = [
            ("", "%2F"),
            ("%2F", "%252F"),
            ("%252F", "%25252F"),
            (".", "%2E"),
            ("..", "%2E%2E"),
            ("%2E%2E", "%252E%252E"),
            ("a\0b", "a%00b"),
            ("a%\0", "a%25%00"),
            ("a%00b", "a%2500b"),
            ("a%2500b", "a%252500b"),
        ];
        for (part, component) in forms {
            assert_eq!(component_of("sub", part, ""), component);
            assert_eq!(decode_file("sub", component, ""), part);
        }
        // With a suffix behind them, dots are a file name.
        assert_eq!(component_of("", "%2E", ".npy"), "%2E.npy");
        assert_eq!(decode_file("", "%2E", ".npy"), "%2E");
        assert_eq!(decode_file("", "%00", ".npy"), "\0");
    }

    #[test]
    fn names_that_begin_with_a_slash_are_files_of_the_root() {
        for name in ["/", "//", "/x", "/x/y", "/100%"] {
            assert_eq!((split(name), part_end(name, "")), (("", name), None));
            assert!(name == "/" || decode_file("", &encode_file(name, "", name), "") == name);
        }
        let slash = encode_file("/", ".npy", "/");
        assert!(slash.starts_with("%2F%~") && split_hash(&slash) == Some((stable_hash(&[b"/"]), ".npy")));
        assert_eq!(decode_file("", &encode_file("", "", ""), ""), "");
        assert_eq!(encode_file("/x/y", ".arrow", "/x/y"), "%2Fx%2Fy.arrow");
        assert_eq!((encode_file("%2Fx", "", "%2Fx"), decode_file("", "%252Fx", "")), ("%252Fx".into(), "%2Fx".into()));
        assert_eq!((decode_file("sub", "%2Fx", ""), component_of("sub", "%2Fx", "")), ("%2Fx".into(), "%2Fx".into()));
        // A directory of the root cannot have such a name.
        assert_eq!((decode_folder("", "%2Fx"), encode_folder("%2Fx", "%2Fx")), ("%2Fx".into(), "%2Fx".into()));
        assert_eq!((decode_folder("", "%2F"), decode_folder("sub", "%2F")), ("%2F".into(), String::new()));
        assert_eq!((split("a//b"), part_end("a//b", ""), part_end("a//b", "a/")), (("a/", "b"), Some(1), Some(2)));
    }

    #[test]
    fn long_names_carry_their_hash() {
        let names = ["é".repeat(200), format!("{}\0{}", "a".repeat(100), "%25".repeat(50)), "%25".repeat(1 << 20)];
        for long in names {
            let file = encode_file(&long, ".arrow", &long);
            assert!(file.len() <= NAME_MAX && file.ends_with(".arrow") && !file.contains('\0'));
            assert_eq!(split_hash(&file), Some((stable_hash(&[long.as_bytes()]), ".arrow")));
        }
        // One that is too long only once it is escaped.
        let long = "\0".repeat(100);
        assert_eq!(split_hash(&encode_file(&long, "", &long)), Some((stable_hash(&[long.as_bytes()]), "")));
    }

    /// Pieces of which escaped forms, and what looks like them, are made.
    fn pieces() -> impl Strategy<Value = String> {
        let piece =
            prop::sample::select(vec!["%", "%25", "%2F", "%2E", "%00", "%2f", "25", "2F", ".", "a", "é", "%~", "0"]);
        prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    /// What Linux allows as a file name, if it is text.
    fn components() -> impl Strategy<Value = String> {
        let any = prop_oneof![pieces(), "[^/\\x00]{1,60}", "(%25){0,3}(%00|%2F|%2E|%2E%2E|%2Fx)", "[%25]{200,255}"];
        any.prop_filter("a file name", |c| can_be_called(c, "") && c.len() <= NAME_MAX)
    }

    /// Any part of a name in vineyard.
    fn parts() -> impl Strategy<Value = String> {
        let with_nul = (pieces(), pieces()).prop_map(|(before, after)| format!("{before}\0{after}"));
        prop_oneof![pieces(), with_nul, "[^/]{0,60}", components()]
    }

    proptest! {
        #[test]
        fn every_file_name_is_that_of_one_name(component in components(), directory in prop::sample::select(vec!["", "d"])) {
            let part = decode_file(directory, &component, "");
            prop_assert_eq!(component_of(directory, &part, ""), &*component);
            let part = decode_folder(directory, &component);
            prop_assert_eq!(encode_folder(&part, &join(directory, &part)), component);
        }

        #[test]
        fn every_stem_of_a_view_is_that_of_one_name(stem in components(), directory in prop::sample::select(vec!["", "d"])) {
            prop_assume!(stem.len() + ".arrow".len() <= NAME_MAX);
            let part = decode_file(directory, &stem, ".arrow");
            prop_assert_eq!(component_of(directory, &part, ".arrow"), stem + ".arrow");
        }

        #[test]
        fn two_file_names_are_never_one_name(a in components(), b in components()) {
            for directory in ["", "d"] {
                prop_assert_eq!(decode_file(directory, &a, "") == decode_file(directory, &b, ""), a == b);
                prop_assert_eq!(decode_folder(directory, &a) == decode_folder(directory, &b), a == b);
            }
        }

        #[test]
        fn every_name_comes_back_from_its_file_name(part in parts(), slash in any::<bool>(), which in 0..2usize) {
            let suffix = SUFFIXES[which];
            let (directory, part) = if slash { ("", format!("/{part}")) } else { ("d", part) };
            let file = component_of(directory, &part, suffix);
            prop_assert!(can_be_called(&file, "") && file.len() <= NAME_MAX);
            let stem = file.strip_suffix(suffix).unwrap_or_default();
            if part == "/" || escape(&part).len() + suffix.len() > NAME_MAX {
                return Ok(());
            }
            prop_assert_eq!(decode_file(directory, stem, suffix), part);
        }
    }
}
