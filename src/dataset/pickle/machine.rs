//! Reads pickle protocols 2 to 5 into plain values. Nothing is imported, called or executed: a call is a value that
//! says what would be called with what.
//!
//! Format: `Lib/pickletools.py` of CPython 3. Long byte strings are not read at all, only their places are kept.

use crate::dataset::Span;
use crate::error::Error;
use crate::vineyard::BlobSource;

/// Most values that a pickle may make: 64 MiB of them.
const MAX_VALUES: usize = 1 << 21;
/// Most operations.
const MAX_OPERATIONS: usize = 1 << 24;
/// Most bytes of text.
const MAX_TEXT: usize = 64 << 20;
/// Bytes that are read at once.
const WINDOW: u64 = 64 << 10;

/// A value's place in [`Loaded`].
pub type Ref = u32;

/// Why a pickle was not read to its end.
#[derive(Debug)]
pub enum Stop {
    /// The blob could not be read.
    Source(Error),
    /// It is not a pickle, past a limit, or of an unknown kind.
    Unknown(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Source(error)
    }
}

/// Shorthand for [`Stop::Unknown`].
pub fn unknown<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Unknown(why.into()))
}

/// A Python value, as far as a pickle tells.
#[derive(Clone, Debug)]
pub enum Value {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A larger integer; its value is not kept.
    BigInt,
    /// A float.
    Float(f64),
    /// A string: a place in the text.
    Str {
        /// First byte.
        at: u32,
        /// Number of bytes.
        len: u32,
    },
    /// Bytes or a bytearray: a place in the pickle.
    Bytes {
        /// First byte.
        at: u64,
        /// Number of bytes.
        len: u64,
    },
    /// A tuple.
    Tuple(Vec<Ref>),
    /// A list.
    List(Vec<Ref>),
    /// A dictionary, in order.
    Dict(Vec<(Ref, Ref)>),
    /// A set or frozenset.
    Set,
    /// `module.name`.
    Global {
        /// The module.
        module: Ref,
        /// The name in it.
        name: Ref,
    },
    /// What a call or a constructor would return.
    Call {
        /// What is called.
        callable: Ref,
        /// A tuple.
        args: Ref,
        /// What `__setstate__` would get.
        state: Option<Ref>,
    },
}

/// A pickle that was read to its end.
pub struct Loaded {
    values: Vec<Value>,
    text: Vec<u8>,
    /// The whole value.
    pub root: Ref,
    /// Where [`Value::Bytes`] are.
    pub pickle: Span,
}

/// A call that was looked up: what is called, its arguments and state.
#[derive(Clone, Copy)]
pub struct Called<'a> {
    /// The module of the callable.
    pub module: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its arguments.
    pub args: &'a [Ref],
    /// Its state.
    pub state: Option<Ref>,
}

impl Loaded {
    /// A value.
    pub fn value(&self, at: Ref) -> Option<&Value> {
        self.values.get(at as usize)
    }

    /// A string.
    pub fn text(&self, at: Ref) -> Option<&str> {
        match self.value(at)? {
            Value::Str { at, len } => {
                let bytes = self.text.get(*at as usize..(*at as usize).checked_add(*len as usize)?)?;
                std::str::from_utf8(bytes).ok()
            }
            _ => None,
        }
    }

    /// An integer.
    pub fn int(&self, at: Ref) -> Option<i64> {
        match self.value(at)? {
            Value::Int(n) => Some(*n),
            Value::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    /// A tuple or list.
    pub fn items(&self, at: Ref) -> Option<&[Ref]> {
        match self.value(at)? {
            Value::Tuple(items) | Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// A value of a dictionary with text keys.
    pub fn entry(&self, at: Ref, key: &str) -> Option<Ref> {
        match self.value(at)? {
            Value::Dict(pairs) => pairs.iter().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, v)| *v),
            _ => None,
        }
    }

    /// Module and name of a global.
    pub fn global(&self, at: Ref) -> Option<(&str, &str)> {
        match self.value(at)? {
            Value::Global { module, name } => Some((self.text(*module)?, self.text(*name)?)),
            _ => None,
        }
    }

    /// A call of a global.
    pub fn called(&self, at: Ref) -> Option<Called<'_>> {
        match self.value(at)? {
            Value::Call { callable, args, state } => {
                let (module, name) = self.global(*callable)?;
                Some(Called { module, name, args: self.items(*args)?, state: *state })
            }
            _ => None,
        }
    }

    /// Bytes, by place.
    pub fn bytes(&self, at: Ref) -> Option<Span> {
        match self.value(at)? {
            Value::Bytes { at, len } => self.pickle.slice(*at, *len).ok(),
            _ => None,
        }
    }
}

struct Machine<'a> {
    source: &'a dyn BlobSource,
    pickle: &'a Span,
    /// Offset in the pickle of the next byte.
    at: u64,
    window: Vec<u8>,
    window_at: u64,
    values: Vec<Value>,
    text: Vec<u8>,
    stack: Vec<Ref>,
    marks: Vec<usize>,
    memo: Vec<Option<Ref>>,
    memoized: usize,
}

/// Reads a pickle.
pub fn load(pickle: &Span, source: &dyn BlobSource) -> Result<Loaded, Stop> {
    let mut machine = Machine {
        source,
        pickle,
        at: 0,
        window: Vec::new(),
        window_at: 0,
        values: Vec::new(),
        text: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        memoized: 0,
    };
    for _ in 0..MAX_OPERATIONS {
        if let Some(root) = machine.step()? {
            return Ok(Loaded { values: machine.values, text: machine.text, root, pickle: pickle.clone() });
        }
    }
    unknown("a pickle of too many operations")
}

impl Machine<'_> {
    /// The next `n` bytes, a small number.
    fn take(&mut self, n: u64) -> Result<&[u8], Stop> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.pickle.len());
        let Some(end) = end else { return unknown("a pickle that is cut off") };
        if self.at < self.window_at || end > self.window_at + self.window.len() as u64 {
            let len = n.max(WINDOW).min(self.pickle.len() - self.at);
            self.window.resize(len as usize, 0);
            self.pickle.read(self.source, self.at, &mut self.window)?;
            self.window_at = self.at;
        }
        let start = (self.at - self.window_at) as usize;
        self.at = end;
        Ok(&self.window[start..start + n as usize])
    }

    fn byte(&mut self) -> Result<u8, Stop> {
        Ok(self.take(1)?.first().copied().unwrap_or_default())
    }

    /// A little-endian unsigned number of `n` bytes.
    fn number(&mut self, n: u64) -> Result<u64, Stop> {
        Ok(self.take(n)?.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    fn push(&mut self, value: Value) -> Result<Ref, Stop> {
        let at = self.add(value)?;
        self.stack.push(at);
        Ok(at)
    }

    fn add(&mut self, value: Value) -> Result<Ref, Stop> {
        if self.values.len() >= MAX_VALUES {
            return unknown("a pickle of too many values");
        }
        self.values.push(value);
        Ok((self.values.len() - 1) as Ref)
    }

    fn pop(&mut self) -> Result<Ref, Stop> {
        // What lies under a mark is not reachable before the mark is gone.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return unknown("a pickle that takes from an empty stack");
        }
        self.stack.pop().map_or_else(|| unknown("an empty stack"), Ok)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Ref>, Stop> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => unknown("a pickle without a mark where one is needed"),
        }
    }

    fn top(&mut self) -> Result<&mut Value, Stop> {
        let at = self.stack.last().copied();
        match at.and_then(|at| self.values.get_mut(at as usize)) {
            Some(value) => Ok(value),
            None => unknown("a pickle that changes what is not there"),
        }
    }

    fn add_text(&mut self, len: u64) -> Result<Value, Stop> {
        if len > (MAX_TEXT - self.text.len()) as u64 {
            return unknown("a pickle of too much text");
        }
        let bytes = self.take(len)?.to_vec();
        if std::str::from_utf8(&bytes).is_err() {
            return unknown("a pickle with text that is not UTF-8");
        }
        let at = self.text.len() as u32;
        self.text.extend_from_slice(&bytes);
        Ok(Value::Str { at, len: len as u32 })
    }

    fn bytes(&mut self, len: u64) -> Result<Value, Stop> {
        let at = self.at;
        match at.checked_add(len).filter(|end| *end <= self.pickle.len()) {
            Some(end) => self.at = end,
            None => return unknown("a pickle that is cut off"),
        }
        Ok(Value::Bytes { at, len })
    }

    fn long(&mut self, len: u64) -> Result<Value, Stop> {
        if len > 8 {
            // Also a number of few digits may come in many bytes; nobody writes that.
            self.bytes(len)?;
            return Ok(Value::BigInt);
        }
        let raw = self.number(len)?;
        let unused = 64 - 8 * len as u32;
        // Shifting up and down again extends the sign; no bytes are the number 0.
        Ok(Value::Int(if len == 0 { 0 } else { ((raw << unused) as i64) >> unused }))
    }

    fn line(&mut self) -> Result<Value, Stop> {
        let start = self.at;
        for _ in 0..4096 {
            if self.byte()? == b'\n' {
                let len = self.at - start - 1;
                self.at = start;
                let text = self.add_text(len)?;
                self.at += 1;
                return Ok(text);
            }
        }
        unknown("a pickle with a long name")
    }

    fn memoize(&mut self, slot: usize) -> Result<(), Stop> {
        let Some(top) = self.stack.last().copied() else { return unknown("a pickle that keeps nothing") };
        if slot > MAX_VALUES {
            return unknown("a pickle of too many kept values");
        }
        if slot >= self.memo.len() {
            self.memo.resize(slot + 1, None);
        }
        if let Some(place) = self.memo.get_mut(slot)
            && place.replace(top).is_none()
        {
            self.memoized += 1;
        }
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Result<(), Stop> {
        let kept = usize::try_from(slot).ok().and_then(|slot| self.memo.get(slot).copied().flatten());
        match kept {
            // References take no value, so the stack needs a bound of its own.
            Some(at) if self.stack.len() < MAX_VALUES => {
                self.stack.push(at);
                Ok(())
            }
            _ => unknown("a pickle that recalls what it did not keep"),
        }
    }

    fn tuple(&mut self, n: usize) -> Result<(), Stop> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items)).map(drop)
    }

    fn extend(&mut self, items: Vec<Ref>) -> Result<(), Stop> {
        match self.top()? {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => unknown("a pickle that appends to what is no list"),
        }
    }

    fn set_items(&mut self, items: Vec<Ref>) -> Result<(), Stop> {
        match self.top()? {
            Value::Dict(pairs) if items.len().is_multiple_of(2) => {
                pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => unknown("a pickle that sets items of what is no dictionary"),
        }
    }

    fn call(&mut self) -> Result<(), Stop> {
        let args = self.pop()?;
        let callable = self.pop()?;
        self.push(Value::Call { callable, args, state: None }).map(drop)
    }

    /// One operation; the value when it was the last.
    fn step(&mut self) -> Result<Option<Ref>, Stop> {
        match self.byte()? {
            0x80 => match self.byte()? {
                2..=5 => {}
                version => return unknown(format!("a pickle of protocol {version}")),
            },
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => match self.stack.last().copied() {
                Some(top) if self.stack.len() < MAX_VALUES => self.stack.push(top),
                _ => return unknown("a pickle that doubles nothing"),
            },
            b'N' => drop(self.push(Value::None)?),
            0x88 => drop(self.push(Value::Bool(true))?),
            0x89 => drop(self.push(Value::Bool(false))?),
            b'J' => {
                let n = self.number(4)? as u32 as i32;
                self.push(Value::Int(i64::from(n)))?;
            }
            b'K' => {
                let n = self.number(1)? as i64;
                self.push(Value::Int(n))?;
            }
            b'M' => {
                let n = self.number(2)? as i64;
                self.push(Value::Int(n))?;
            }
            code @ (0x8a | 0x8b) => {
                let len = self.number(if code == 0x8a { 1 } else { 4 })?;
                let value = self.long(len)?;
                self.push(value)?;
            }
            b'G' => {
                let bits = self.number(8)?.swap_bytes();
                self.push(Value::Float(f64::from_bits(bits)))?;
            }
            code @ (b'C' | b'B' | 0x8e | 0x96 | b'U' | b'T') => {
                let width = match code {
                    b'C' | b'U' => 1,
                    b'B' | b'T' => 4,
                    _ => 8,
                };
                let len = self.number(width)?;
                let value = self.bytes(len)?;
                self.push(value)?;
            }
            code @ (0x8c | b'X' | 0x8d) => {
                let width = match code {
                    0x8c => 1,
                    b'X' => 4,
                    _ => 8,
                };
                let len = self.number(width)?;
                let value = self.add_text(len)?;
                self.push(value)?;
            }
            b')' => drop(self.push(Value::Tuple(Vec::new()))?),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items))?;
            }
            code @ 0x85..=0x87 => self.tuple(usize::from(code - 0x84))?,
            b']' => drop(self.push(Value::List(Vec::new()))?),
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend(items)?;
            }
            b'}' => drop(self.push(Value::Dict(Vec::new()))?),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()))?;
                self.set_items(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            0x8f => drop(self.push(Value::Set)?),
            0x90 => {
                self.pop_to_mark()?;
                if !matches!(self.top()?, Value::Set) {
                    return unknown("a pickle that adds to what is no set");
                }
            }
            0x91 => {
                self.pop_to_mark()?;
                self.push(Value::Set)?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                let (module, name) = (self.add(module)?, self.add(name)?);
                self.push(Value::Global { module, name })?;
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                self.push(Value::Global { module, name })?;
            }
            b'R' | 0x81 => self.call()?,
            0x92 => {
                // Keyword arguments: none of the known constructors has any, so an empty dictionary is all that passes.
                let keywords = self.pop()?;
                match self.values.get(keywords as usize) {
                    Some(Value::Dict(pairs)) if pairs.is_empty() => self.call()?,
                    _ => return unknown("a pickle of a constructor with keywords"),
                }
            }
            b'b' => {
                let new = self.pop()?;
                match self.top()? {
                    Value::Call { state, .. } if state.is_none() => *state = Some(new),
                    _ => return unknown("a pickle that sets the state of a plain value"),
                }
            }
            b'q' => {
                let slot = self.number(1)? as usize;
                self.memoize(slot)?;
            }
            b'r' => {
                let slot = self.number(4)? as usize;
                self.memoize(slot)?;
            }
            0x94 => self.memoize(self.memoized)?,
            b'h' => {
                let slot = self.number(1)?;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.number(4)?;
                self.recall(slot)?;
            }
            // Bytes that are already in the pickle are as good as read-only.
            0x98 => {}
            code => return unknown(format!("a pickle with the operation 0x{code:02x}")),
        }
        if self.marks.len() > MAX_VALUES {
            return unknown("a pickle of too many marks");
        }
        Ok(None)
    }
}
