//! `DELTA_BINARY_PACKED`, the encoding of string lengths.
//!
//! Format: <https://parquet.apache.org/docs/file-format/data-pages/encodings/#delta-encoding-delta_binary_packed--5>.

/// Values of a block, and of each of its miniblocks, as every writer chooses them.
const BLOCK: usize = 128;
const MINIBLOCK: usize = 32;

/// Appends a number in base 128, lowest digits first.
pub fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed number so that small ones are short.
pub fn zigzag(out: &mut Vec<u8>, value: i64) {
    varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Appends non-negative 32-bit values.
pub fn encode(values: &[i32], out: &mut Vec<u8>) {
    varint(out, BLOCK as u64);
    varint(out, (BLOCK / MINIBLOCK) as u64);
    varint(out, values.len() as u64);
    zigzag(out, i64::from(values.first().copied().unwrap_or(0)));
    let mut previous = i64::from(values.first().copied().unwrap_or(0));
    for block in values.get(1..).unwrap_or(&[]).chunks(BLOCK) {
        // The difference of two values of 31 bits takes 32, and so does that of two such differences.
        let mut deltas = [0i64; BLOCK];
        for (delta, value) in deltas.iter_mut().zip(block) {
            *delta = i64::from(*value) - previous;
            previous = i64::from(*value);
        }
        let deltas = &mut deltas[..block.len()];
        let least = deltas.iter().copied().min().unwrap_or(0);
        deltas.iter_mut().for_each(|delta| *delta -= least);
        zigzag(out, least);
        let widths = out.len();
        out.extend_from_slice(&[0; BLOCK / MINIBLOCK]);
        for (i, miniblock) in deltas.chunks(MINIBLOCK).enumerate() {
            let all = miniblock.iter().fold(0, |all, delta| all | *delta as u64);
            let width = 64 - all.leading_zeros();
            out[widths + i] = width as u8;
            let end = out.len() + MINIBLOCK * width as usize / 8;
            pack(miniblock.iter().map(|delta| *delta as u64), width, out);
            // A miniblock is whole even where values are missing.
            out.resize(end, 0);
        }
    }
}

/// Appends values of so many bits each, at most 33, lowest bits first; the last byte is filled with zeros.
pub fn pack(values: impl Iterator<Item = u64>, width: u32, out: &mut Vec<u8>) {
    let mut bits = 0u64;
    let mut filled = 0;
    for value in values {
        // At most 7 bits are left from before.
        bits |= value << filled;
        filled += width;
        while filled >= 8 {
            out.push(bits as u8);
            bits >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(bits as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_format_is_encoded_as_it_says() {
        // "1, 2, 3, 4, 5": all deltas are 1, so that every miniblock has width 0.
        let mut out = Vec::new();
        encode(&[1, 2, 3, 4, 5], &mut out);
        assert_eq!(out, [128, 1, 4, 5, 2, 2, 0, 0, 0, 0]);
        // "7, 5, 3, 1, 2, 3, 4, 5": the least delta is -2, the rest 0 0 0 3 3 3 3 in 2 bits.
        out.clear();
        encode(&[7, 5, 3, 1, 2, 3, 4, 5], &mut out);
        assert_eq!(out, [128, 1, 4, 8, 14, 3, 2, 0, 0, 0, 0b1100_0000, 0b0011_1111, 0, 0, 0, 0, 0, 0]);
    }
}
