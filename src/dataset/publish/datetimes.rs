//! Columns of times of a pandas frame, as vineyard's official client stores them: pickles of pandas' `DatetimeArray`.
//!
//! What such a pickle is made of: `pandas/_libs/arrays.pyx` (`NDArrayBacked`), `DatetimeTZDtype` of
//! `pandas/core/dtypes/dtypes.py`, and `array_reduce_ex` of `numpy/_core/src/multiarray/methods.c`; opcodes: Python's
//! `pickletools`. The values lie in it as one piece, so that the blob is that of the column with some bytes around it.

use arrow_schema::{DataType, TimeUnit};

use super::plan::Part;

/// What a pickle says of its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Times {
    unit: &'static str,
    zone: Option<String>,
}

/// The value of `NaT`, and what pandas has under a null.
pub(super) const NOT_A_TIME: i64 = i64::MIN;

impl Times {
    /// Times that a pickle can say; `None` for other types, and for zones that have no name.
    pub(super) fn of(data_type: &DataType) -> Option<Times> {
        let DataType::Timestamp(unit, zone) = data_type else { return None };
        let unit = match unit {
            TimeUnit::Second => "s",
            TimeUnit::Millisecond => "ms",
            TimeUnit::Microsecond => "us",
            TimeUnit::Nanosecond => "ns",
        };
        let named = |zone: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_+-/".contains(c);
            zone == "UTC" || (zone.contains('/') && zone.len() < 64 && zone.chars().all(plain))
        };
        match zone {
            None => Some(Times { unit, zone: None }),
            Some(zone) => named(zone).then(|| Times { unit, zone: Some(zone.to_string()) }),
        }
    }

    /// numpy's name of the type.
    pub(super) fn numpy_type(&self) -> String {
        format!("datetime64[{}]", self.unit)
    }

    /// The pickle of `rows` values.
    pub(super) fn pickle(&self, rows: u64, values: Vec<Part>) -> Vec<Part> {
        let mut out = Pickle(vec![0x80, 5]);
        out.global("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked");
        out.global("pandas.core.arrays.datetimes", "DatetimeArray");
        out.int(82_904_607);
        // (class, checksum, None), called; then the state: (dtype, array, attributes).
        out.bytes(b"N\x87R");
        match &self.zone {
            None => out.numpy_dtype(self.unit),
            Some(zone) => out.zone_dtype(self.unit, zone),
        }
        // _reconstruct(ndarray, (0,), b'b'), then its state: version, shape, dtype, Fortran order, bytes.
        out.global("numpy._core.multiarray", "_reconstruct");
        out.global("numpy", "ndarray");
        out.int(0);
        out.bytes(b"\x85C\x01b\x87R(");
        out.int(1);
        out.int(rows as i64);
        out.bytes(b"\x85");
        out.numpy_dtype(self.unit);
        out.bytes(b"\x89\x8e");
        out.bytes(&(rows * 8).to_le_bytes());
        let mut parts = vec![Part::owned(out.0)];
        parts.extend(values);
        parts.push(Part::owned(b"tb}\x87b.".to_vec()));
        parts
    }
}

/// Opcodes in the making.
struct Pickle(Vec<u8>);

impl Pickle {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Text of fewer than 256 bytes.
    fn text(&mut self, text: &str) {
        self.bytes(&[0x8c, text.len() as u8]);
        self.bytes(text.as_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.text(module);
        self.text(name);
        self.bytes(b"\x93");
    }

    fn int(&mut self, value: i64) {
        match i32::try_from(value) {
            Ok(small) => {
                self.bytes(b"J");
                self.bytes(&small.to_le_bytes());
            }
            Err(_) => {
                self.bytes(&[0x8a, 8]);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// `dtype('<M8[unit]')`: `dtype('M8', False, True)` with a state.
    fn numpy_dtype(&mut self, unit: &str) {
        self.global("numpy", "dtype");
        self.text("M8");
        self.bytes(b"\x89\x88\x87R(");
        self.int(4);
        self.text("<");
        self.bytes(b"NNN");
        for value in [-1, -1, 0] {
            self.int(value);
        }
        self.bytes(b"N(C");
        self.bytes(&[unit.len() as u8]);
        self.bytes(unit.as_bytes());
        for _ in 0..3 {
            self.int(1);
        }
        self.bytes(b"t\x86tb");
    }

    /// `DatetimeTZDtype` with the state `{'unit': ..., 'tz': ...}`.
    fn zone_dtype(&mut self, unit: &str, zone: &str) {
        self.global("pandas", "DatetimeTZDtype");
        self.bytes(b")\x81}(");
        self.text("unit");
        self.text(unit);
        self.text("tz");
        if zone == "UTC" {
            self.global("datetime", "timezone");
            self.global("datetime", "timedelta");
            for _ in 0..3 {
                self.int(0);
            }
            self.bytes(b"\x87R\x85R");
        } else {
            self.global("builtins", "getattr");
            self.global("zoneinfo", "ZoneInfo");
            self.text("_unpickle");
            self.bytes(b"\x86R");
            self.text(zone);
            self.int(1);
            self.bytes(b"\x86R");
        }
        self.bytes(b"ub");
    }
}
