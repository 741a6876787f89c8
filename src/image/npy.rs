//! Tensors as `.npy` files: a text header and the elements.
//!
//! Format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>. The header has the padding that
//! `numpy.save` gives it, so that a row-major array's view is the file that `numpy.save` would have written.

use std::fmt::Write;

use super::extent::{Builder, Image};
use crate::dataset::Tensor;
use crate::error::{Error, Kind, Result};

/// The elements start at a multiple of this.
const ALIGNMENT: usize = 64;
/// Digits that `numpy.save` leaves room for in the first length, so that a file can grow in place.
const GROWTH_DIGITS: usize = 21;

/// True if the element type can stand in a `.npy` file: numbers, booleans, times, fixed-length text and bytes, and
/// records of them; not Python objects.
pub fn supports(tensor: &Tensor) -> bool {
    let descr = tensor.descr.as_str();
    if !descr.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return false;
    }
    if let Some(fields) = descr.strip_prefix('[') {
        // `|O` anywhere in a record would be pointers.
        return fields.ends_with(']') && !fields.contains("|O") && !fields.contains("'O'");
    }
    let mut chars = descr.chars();
    let order = chars.next();
    let kind = chars.next();
    matches!(order, Some('<' | '>' | '|' | '='))
        && matches!(kind, Some('b' | 'i' | 'u' | 'f' | 'c' | 'm' | 'M' | 'S' | 'U' | 'V'))
        && !descr.contains(['\'', '"', '\\'])
}

/// Bytes of the elements.
///
/// # Errors
/// `Malformed` if the shape needs more than the buffer has or than can be counted.
fn data_len(tensor: &Tensor) -> Result<u64> {
    let elements = tensor.shape.iter().try_fold(1u64, |product, length| product.checked_mul(*length));
    // A length of 0 makes the product 0 even where the others overflow.
    let elements = if tensor.shape.contains(&0) { Some(0) } else { elements };
    elements
        .and_then(|elements| elements.checked_mul(tensor.item_size))
        .filter(|bytes| *bytes <= tensor.data.len())
        .ok_or_else(|| {
            Error::malformed(format!(
                "shape {:?} of {} bytes each in a buffer of {}",
                tensor.shape,
                tensor.item_size,
                tensor.data.len()
            ))
        })
}

/// The `.npy` file of a tensor.
///
/// # Errors
/// `Unsupported` for element types that the format does not have, `Malformed` if the shape does not fit the buffer.
pub fn image(tensor: &Tensor) -> Result<Image> {
    if !supports(tensor) {
        return Err(Error::new(Kind::Unsupported, format!("elements of type {:?} in a .npy file", tensor.descr)));
    }
    let len = data_len(tensor)?;
    let mut file = Builder::new();
    file.bytes(&header(&tensor.descr, &tensor.shape)?);
    file.span(tensor.data.slice(0, len)?);
    Ok(file.finish())
}

/// Magic, version, length and the padded header dictionary.
fn header(descr: &str, shape: &[u64]) -> Result<Vec<u8>> {
    let quote = if descr.starts_with('[') { "" } else { "'" };
    let mut text = format!("{{'descr': {quote}{descr}{quote}, 'fortran_order': False, 'shape': (");
    for (i, length) in shape.iter().enumerate() {
        let separator = if i == 0 { "" } else { ", " };
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{separator}{length}");
    }
    text.push_str(if shape.len() == 1 { ",), }" } else { "), }" });
    if let Some(first) = shape.first() {
        let room = GROWTH_DIGITS.saturating_sub(first.to_string().len());
        text.extend(std::iter::repeat_n(' ', room));
    }
    // Version 2 has four bytes for the length where version 1 has two.
    let padded = |prefix: usize| {
        let used = prefix + text.len() + 1;
        text.len() + (ALIGNMENT - used % ALIGNMENT) + 1
    };
    let mut out = b"\x93NUMPY".to_vec();
    let length = match u16::try_from(padded(10)) {
        Ok(length) => {
            out.extend_from_slice(&[1, 0]);
            out.extend_from_slice(&length.to_le_bytes());
            usize::from(length)
        }
        Err(_) => {
            let length = u32::try_from(padded(12))
                .map_err(|_| Error::new(Kind::TooLarge, format!("a .npy header of {} bytes", text.len())))?;
            out.extend_from_slice(&[2, 0]);
            out.extend_from_slice(&length.to_le_bytes());
            length as usize
        }
    };
    let end = out.len() + length;
    out.extend_from_slice(text.as_bytes());
    out.resize(end - 1, b' ');
    out.push(b'\n');
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dataset::Span;

    fn tensor(descr: &str, item_size: u64, shape: &[u64], bytes: usize) -> Tensor {
        Tensor {
            descr: descr.into(),
            item_size,
            shape: shape.into(),
            fortran: false,
            data: Span::literal((0..bytes).map(|i| i as u8).collect::<Vec<u8>>()),
            table: None,
        }
    }

    #[test]
    fn headers_are_those_of_numpy_save() {
        // `numpy.save` of 2.4 wrote these.
        let expected = format!("{:<117}\n", "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 5), }");
        let header = header("<f8", &[2, 5]).unwrap();
        assert_eq!(&header[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert_eq!(std::str::from_utf8(&header[10..]).unwrap(), expected);
        let scalar = super::header("|b1", &[]).unwrap();
        assert_eq!(scalar.len() % 64, 0);
        assert!(
            std::str::from_utf8(&scalar[10..])
                .unwrap()
                .starts_with("{'descr': '|b1', 'fortran_order': False, 'shape': (), }")
        );
        let vector = super::header("[('a', '<i4'), ('b', '<f8')]", &[3]).unwrap();
        assert!(std::str::from_utf8(&vector[10..]).unwrap().contains("'descr': [('a', '<i4'), ('b', '<f8')], "));
    }

    #[test]
    fn long_headers_take_version_2() {
        let fields: Vec<String> = (0..5000).map(|i| format!("('field_{i}', '<i4')")).collect();
        let header = header(&format!("[{}]", fields.join(", ")), &[3]).unwrap();
        assert_eq!(&header[6..8], &[2, 0]);
        assert_eq!(header.len() % 64, 0);
        assert_eq!(header.last(), Some(&b'\n'));
        assert_eq!(u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize, header.len() - 12);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        assert_eq!(image(&tensor("<i4", 4, &[2, 3], 24)).unwrap().size(), 128 + 24);
        assert_eq!(image(&tensor("<i4", 4, &[0, u64::MAX, 2], 0)).unwrap().size(), 128);
        for shape in [&[7][..], &[u64::MAX, 2], &[1 << 62, 4]] {
            assert_eq!(image(&tensor("<i4", 4, shape, 24)).unwrap_err().kind(), Kind::Malformed);
        }
        for descr in ["|O", "", "str", "<f8'", "<i4\n", "é"] {
            assert_eq!(image(&tensor(descr, 4, &[6], 24)).unwrap_err().kind(), Kind::Unsupported, "{descr:?}");
        }
    }
}
