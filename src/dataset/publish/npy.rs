//! NumPy files as vineyard's `Tensor`.
//!
//! Format: `numpy/lib/format.py` of NumPy. Layout of tensors: `python/vineyard/data/tensor.py` of v6d 0.24; the buffer is
//! always row-major there.

use std::ops::Range;

use serde_json::Value;

use super::plan::{Draft, Fields, Part, field};
use crate::error::{Error, Result};

/// First bytes of a file.
pub(super) const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Most dimensions that NumPy has.
const MAX_DIMENSIONS: usize = 64;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Element type, such as `<f8`; `None` for structured types.
    pub(super) descr: Option<String>,
    /// Column-major.
    pub(super) fortran: bool,
    /// Lengths, outermost first.
    pub(super) shape: Vec<u64>,
    /// Where the elements start.
    pub(super) data: u64,
}

/// Why there is no header.
#[derive(Debug)]
pub(super) enum Missing {
    /// The file ends before it does.
    Short,
    /// It is none.
    Broken(Error),
}

/// Reads the header.
pub(super) fn header(staged: &[u8]) -> std::result::Result<Header, Missing> {
    let broken = |what: &str| Missing::Broken(Error::malformed(format!("a .npy header {what}")));
    let rest = staged.strip_prefix(MAGIC.as_slice()).ok_or_else(|| broken("without its magic"))?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or(Missing::Short)?;
    let (length, rest, before) = match version[0] {
        1 => {
            let (length, rest) = rest.split_first_chunk::<2>().ok_or(Missing::Short)?;
            (u16::from_le_bytes(*length) as usize, rest, 10)
        }
        2 | 3 => {
            let (length, rest) = rest.split_first_chunk::<4>().ok_or(Missing::Short)?;
            (u32::from_le_bytes(*length) as usize, rest, 12)
        }
        _ => return Err(broken("of an unknown version")),
    };
    let text = rest.get(..length).ok_or(Missing::Short)?;
    if length > 1 << 20 {
        return Err(broken("of over a mebibyte"));
    }
    let text = std::str::from_utf8(text).map_err(|_| broken("that is no text"))?;
    let mut parser = Literal { rest: text.trim() };
    let value = parser.value(0).filter(|_| parser.rest.is_empty()).ok_or_else(|| broken("that is no dictionary"))?;
    let fortran = value.get("fortran_order").and_then(Value::as_bool).ok_or_else(|| broken("without an order"))?;
    let shape: Option<Vec<u64>> =
        value.get("shape").and_then(Value::as_array).and_then(|list| list.iter().map(Value::as_u64).collect());
    let shape = shape.filter(|s| s.len() <= MAX_DIMENSIONS).ok_or_else(|| broken("without a shape"))?;
    let descr = value.get("descr").ok_or_else(|| broken("without a type"))?;
    Ok(Header { descr: descr.as_str().map(str::to_owned), fortran, shape, data: (before + length) as u64 })
}

impl Header {
    /// Bytes of one element, for types with a plain name.
    pub(super) fn item_size(&self) -> Option<u64> {
        let descr = self.descr.as_deref()?;
        let kind = descr.get(1..2)?;
        let digits = descr.get(2..)?;
        let digits = digits.split_once('[').map_or(digits, |(digits, _)| digits);
        let size: u64 = digits.parse().ok()?;
        if kind == "U" { size.checked_mul(4) } else { Some(size) }
    }

    /// Bytes of all elements.
    pub(super) fn data_len(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.item_size()?, |product, &n| product.checked_mul(n))
    }
}

/// What a tensor's keys are, and whether its blob holds the file's elements as they lie there.
pub(super) fn tensor(draft: &mut Draft, staged: &[u8]) -> Result<(String, Fields, bool)> {
    let header = match header(staged) {
        Ok(header) => header,
        Err(Missing::Short) => return Err(Error::malformed("a .npy header that is cut")),
        Err(Missing::Broken(error)) => return Err(error),
    };
    let refuse = |what: &str| Error::malformed(format!("vineyard has no tensor {what}"));
    let descr = header.descr.as_deref().ok_or_else(|| refuse("of structured elements"))?;
    let (parameter, value_type) = element(descr).ok_or_else(|| refuse(&format!("of {descr:?}")))?;
    let item = header.item_size().filter(|&n| n > 0).ok_or_else(|| refuse(&format!("of {descr:?}")))?;
    let len = header.data_len().ok_or_else(|| refuse("of that size"))?;
    let end = header.data.checked_add(len).ok_or_else(|| refuse("of that size"))?;
    if end != staged.len() as u64 {
        return Err(Error::malformed(format!("a .npy file of {} bytes whose array ends at {end}", staged.len())));
    }
    let at = header.data..end;
    // With at most one dimension longer than 1, both orders are the same bytes.
    let transpose = header.fortran && header.shape.iter().filter(|&&n| n != 1).count() > 1 && len > 0;
    let part = if transpose {
        Part::Transposed(std::sync::Arc::new(Transposed { at, item, shape: header.shape.clone() }))
    } else {
        Part::Staged(at)
    };
    let shape: Vec<String> = header.shape.iter().map(u64::to_string).collect();
    let buffer = draft.blob(vec![part]);
    let fields = vec![
        field("value_type_", value_type),
        field("value_type_meta_", descr),
        field("shape_", format!("[{}]", shape.join(", "))),
        field("partition_index_", "[]"),
        field("order_", if header.fortran { "\"F\"" } else { "\"C\"" }),
        field("nbytes", len),
        ("buffer_".into(), buffer),
    ];
    Ok((format!("vineyard::Tensor<{parameter}>"), fields, !transpose))
}

/// Parameter of the type name and `value_type_`, for the types that the official client reads back.
pub(super) fn element(descr: &str) -> Option<(String, String)> {
    let (parameter, value_type) = match descr {
        "|b1" => ("bool", "bool"),
        "|i1" => ("int8", "int8"),
        "<i2" => ("int16", "int16"),
        "<i4" => ("int", "int32"),
        "<i8" => ("int64", "int64"),
        "|u1" => ("uint8", "uint8"),
        "<u2" => ("uint16", "uint16"),
        "<u4" => ("uint32", "uint32"),
        "<u8" => ("uint64", "uint64"),
        "<f2" => ("float16", "float16"),
        "<f4" => ("float", "float32"),
        "<f8" => ("double", "float64"),
        "<c8" => ("complex64", "complex64"),
        "<c16" => ("complex128", "complex128"),
        _ => {
            // Plain units only: `<M8[ns]`, not `<M8[25s]` or `<M8`.
            let (name, unit) = [("<M8[", "datetime64"), ("<m8[", "timedelta64")]
                .into_iter()
                .find_map(|(prefix, name)| Some((name, descr.strip_prefix(prefix)?.strip_suffix(']')?)))?;
            let known = ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"].contains(&unit);
            return known.then(|| (format!("{name}[{unit}]"), format!("{name}[{unit}]")));
        }
    };
    Some((parameter.into(), value_type.into()))
}

/// A column-major array of the staged file, to be read in row-major order.
#[derive(Debug)]
pub struct Transposed {
    at: Range<u64>,
    item: u64,
    shape: Vec<u64>,
}

impl Transposed {
    /// Number of bytes.
    pub(super) fn len(&self) -> u64 {
        self.at.end - self.at.start
    }

    /// Bytes of one element: pieces start and end between elements.
    pub(super) fn item(&self) -> u64 {
        self.item
    }

    /// Fills `out`, whole elements, with the row-major bytes from `offset`, a multiple of the element size.
    pub(super) fn read(&self, staged: &[u8], offset: u64, out: &mut [u8]) -> Result<()> {
        let data = staged
            .get(self.at.start as usize..self.at.end as usize)
            .ok_or_else(|| Error::malformed("an array outside the file"))?;
        let item = self.item as usize;
        // Distances, in elements, between neighbours along each dimension of the column-major data.
        let mut strides = Vec::with_capacity(self.shape.len());
        let mut stride = 1u64;
        for &n in &self.shape {
            strides.push(stride);
            stride *= n;
        }
        let mut index = vec![0u64; self.shape.len()];
        let mut rest = offset / self.item;
        for (i, &n) in self.shape.iter().enumerate().rev() {
            index[i] = rest % n;
            rest /= n;
        }
        let mut from: u64 = index.iter().zip(&strides).map(|(i, s)| i * s).sum();
        for element in out.chunks_exact_mut(item) {
            let start = from as usize * item;
            let source = data.get(start..start + item).ok_or_else(|| Error::malformed("an array outside the file"))?;
            element.copy_from_slice(source);
            for (i, &n) in self.shape.iter().enumerate().rev() {
                index[i] += 1;
                from += strides[i];
                if index[i] < n {
                    break;
                }
                index[i] = 0;
                from -= strides[i] * n;
            }
        }
        Ok(())
    }
}

/// Python literals as they stand in a header: dictionaries, tuples, lists, strings, integers, True, False.
struct Literal<'a> {
    rest: &'a str,
}

impl<'a> Literal<'a> {
    fn eat(&mut self, token: &str) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > 16 {
            return None;
        }
        if self.eat("{") {
            let mut map = serde_json::Map::new();
            while !self.eat("}") {
                let key = self.value(depth + 1)?.as_str()?.to_owned();
                if !self.eat(":") {
                    return None;
                }
                map.insert(key, self.value(depth + 1)?);
                if !self.eat(",") && !self.rest.starts_with('}') {
                    return None;
                }
            }
            return Some(Value::Object(map));
        }
        for (open, close) in [("(", ")"), ("[", "]")] {
            if self.eat(open) {
                let mut list = Vec::new();
                while !self.eat(close) {
                    list.push(self.value(depth + 1)?);
                    if !self.eat(",") && !self.rest.starts_with(close) {
                        return None;
                    }
                }
                return Some(Value::Array(list));
            }
        }
        for (word, value) in [("True", true), ("False", false)] {
            if self.eat(word) {
                return Some(Value::Bool(value));
            }
        }
        if let Some(quote) = self.rest.chars().next().filter(|c| matches!(c, '\'' | '"')) {
            let (text, rest) = self.rest[1..].split_once(quote)?;
            self.rest = rest.trim_start();
            return (!text.contains('\\')).then(|| Value::String(text.into()));
        }
        let digits = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = self.rest[..digits].parse::<u64>().ok()?;
        // Python 2 wrote long integers with an L.
        self.rest = self.rest[digits..].strip_prefix('L').unwrap_or(&self.rest[digits..]).trim_start();
        Some(Value::from(number))
    }
}
