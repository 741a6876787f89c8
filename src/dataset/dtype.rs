//! numpy's element types: what their names mean and which Arrow array shows them.

use arrow_schema::{DataType, TimeUnit};

use super::column::{Column, PandasType};
use super::derive::{self, Map, Test};
use super::span::Span;
use super::table::ArrayLayout;
use crate::error::{Error, Result};

/// A numpy dtype of fixed width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dtype {
    /// Most significant byte first.
    pub big_endian: bool,
    /// numpy's letter: `b i u f c M m S U V`.
    pub kind: char,
    /// Bytes of one element.
    pub size: u64,
    /// What stands in brackets after `M8` and `m8`: `ns`, `25s`; else empty.
    pub unit: String,
}

impl Dtype {
    /// Reads an array-interface name such as `<f8`, `|b1`, `>i4`, `<M8[ns]`, `<U3`, with or without byte order.
    pub fn parse(descr: &str) -> Option<Dtype> {
        let (big_endian, rest) = match descr.as_bytes().first()? {
            b'<' | b'|' | b'=' => (false, descr.get(1..)?),
            b'>' => (true, descr.get(1..)?),
            _ => (false, descr),
        };
        let kind = rest.chars().next().filter(|c| "biufcMmSUV".contains(*c))?;
        let (digits, unit) = match rest.get(1..)?.split_once('[') {
            Some((digits, unit)) => (digits, unit.strip_suffix(']')?),
            None => (rest.get(1..)?, ""),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || unit.len() > 16 {
            return None;
        }
        let number = digits.parse::<u32>().ok()? as u64;
        let size = if kind == 'U' { number * 4 } else { number };
        let possible = match kind {
            'b' => size == 1,
            'i' | 'u' => matches!(size, 1 | 2 | 4 | 8),
            'f' => matches!(size, 2 | 4 | 8 | 12 | 16),
            'c' => matches!(size, 8 | 16 | 24 | 32),
            'M' | 'm' => size == 8,
            // Elements of no bytes would let a shape announce any number of rows.
            _ => size > 0,
        };
        // The brackets belong to times alone, and what is in them is written into headers of files.
        let unit_ok = unit.bytes().all(|b| b.is_ascii_alphanumeric()) && (unit.is_empty() || "Mm".contains(kind));
        (possible && unit_ok).then(|| Dtype { big_endian: big_endian && size > 1, kind, size, unit: unit.into() })
    }

    /// Reads a type name of vineyard metadata: numpy's (`float64`, `datetime64[us]`) or C++'s (`double`, `int`).
    pub fn parse_name(name: &str) -> Option<Dtype> {
        if let Some(unit) = name.strip_prefix("datetime64") {
            return Dtype::parse(&format!("<M8{unit}"));
        }
        if let Some(unit) = name.strip_prefix("timedelta64") {
            return Dtype::parse(&format!("<m8{unit}"));
        }
        let sized = |prefix: &str, kind: char, per: u32| {
            let bits = name.strip_prefix(prefix)?.parse::<u32>().ok()?;
            (bits % per == 0).then(|| format!("<{kind}{}", bits / per))
        };
        let descr = match name {
            "bool" => "|b1".into(),
            "int8" => "|i1".into(),
            "uint8" => "|u1".into(),
            "int16" => "<i2".into(),
            "uint16" => "<u2".into(),
            "int" | "int32" => "<i4".into(),
            "uint" | "uint32" => "<u4".into(),
            "int64" => "<i8".into(),
            "uint64" => "<u8".into(),
            "float16" | "half" | "halffloat" => "<f2".into(),
            "float" | "float32" => "<f4".into(),
            "double" | "float64" => "<f8".into(),
            "complex64" => "<c8".into(),
            "complex128" => "<c16".into(),
            _ => sized("str", 'U', 32).or_else(|| sized("bytes", 'S', 8)).or_else(|| sized("void", 'V', 8))?,
        };
        Dtype::parse(&descr)
    }

    /// numpy's name with byte order.
    pub fn descr(&self) -> String {
        let order = match (self.big_endian, self.size) {
            _ if matches!(self.kind, 'S' | 'V') => '|',
            (true, _) => '>',
            (false, 1) => '|',
            (false, _) => '<',
        };
        let number = if self.kind == 'U' { self.size / 4 } else { self.size };
        let unit = if self.unit.is_empty() { String::new() } else { format!("[{}]", self.unit) };
        format!("{order}{}{number}{unit}", self.kind)
    }

    /// `count` elements as a column; `data` has exactly their bytes.
    ///
    /// # Errors
    /// `Malformed` if the lengths do not fit.
    pub fn column(&self, data: Span, count: u64) -> Result<Column> {
        if count.checked_mul(self.size) != Some(data.len()) {
            let have = data.len();
            return Err(Error::malformed(format!("{count} elements of {} bytes in {have} bytes", self.size)));
        }
        let plain = |data_type: DataType, data: Span| {
            Column::new(ArrayLayout::flat(data_type, count, Some(0), vec![Span::EMPTY, data]))
        };
        // Half of a complex number is a number.
        let swap = if self.kind == 'c' { self.size / 2 } else { self.size };
        let native = |data: Span| if self.big_endian { derive::map(data, swap, Map::Swap) } else { data };
        let number = match (self.kind, self.size) {
            ('i', 1) => Some(DataType::Int8),
            ('i', 2) => Some(DataType::Int16),
            ('i', 4) => Some(DataType::Int32),
            ('i', 8) => Some(DataType::Int64),
            ('u', 1) => Some(DataType::UInt8),
            ('u', 2) => Some(DataType::UInt16),
            ('u', 4) => Some(DataType::UInt32),
            ('u', 8) => Some(DataType::UInt64),
            ('f', 2) => Some(DataType::Float16),
            ('f', 4) => Some(DataType::Float32),
            ('f', 8) => Some(DataType::Float64),
            _ => None,
        };
        if let Some(data_type) = number {
            return Ok(plain(data_type, native(data)));
        }
        match (self.kind, self.size) {
            ('b', _) => {
                let packed = derive::bits(data, 1, Test::NonZero);
                Ok(plain(DataType::Boolean, packed))
            }
            ('c', 8 | 16) => {
                let part = if self.size == 8 { DataType::Float32 } else { DataType::Float64 };
                let parts = ArrayLayout::flat(part, count * 2, Some(0), vec![Span::EMPTY, native(data)]);
                let note = "complex numbers as pairs of real and imaginary part";
                let mut column = Column::new(parts.into_fixed_lists(2, count)?).with_note(note);
                column.pandas = PandasType::new("object", "object");
                Ok(column)
            }
            ('M' | 'm', _) => Ok(self.time(native(data), count)),
            (_, size) => {
                let width = i32::try_from(size).map_err(|_| Error::malformed("elements of more than 2 GiB"))?;
                let column = plain(DataType::FixedSizeBinary(width), data);
                Ok(match self.kind {
                    'S' => column,
                    kind => column.with_note(format!("raw elements of numpy type {kind}, {}", self.descr())),
                })
            }
        }
    }

    /// Points in time and spans of time; the least integer is "not a time" and becomes null.
    fn time(&self, data: Span, count: u64) -> Column {
        // Units that Arrow lacks are shown in seconds, as pandas does.
        let (unit, scale) = match self.unit.as_str() {
            "s" => (TimeUnit::Second, 1),
            "ms" => (TimeUnit::Millisecond, 1),
            "us" => (TimeUnit::Microsecond, 1),
            "ns" => (TimeUnit::Nanosecond, 1),
            "m" => (TimeUnit::Second, 60),
            "h" => (TimeUnit::Second, 3600),
            "D" => (TimeUnit::Second, 86_400),
            "W" => (TimeUnit::Second, 604_800),
            other => {
                let note = format!("64-bit integers of numpy type {}, unit {other:?}", self.descr());
                let layout = ArrayLayout::flat(DataType::Int64, count, Some(0), vec![Span::EMPTY, data]);
                return Column::new(layout).with_note(note);
            }
        };
        let validity = derive::bits(data.clone(), 8, Test::NotNat);
        let data = if scale == 1 { data } else { derive::map(data, 8, Map::Scale(scale)) };
        let data_type = if self.kind == 'M' { DataType::Timestamp(unit, None) } else { DataType::Duration(unit) };
        let nulls = if count == 0 { Some(0) } else { None };
        Column::new(ArrayLayout::flat(data_type, count, nulls, vec![validity, data]))
    }
}
