//! Memory for the answers to READ requests.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

thread_local! {
    /// The memory of this thread's last answer. New memory would be cleared for each, which costs as much as the copy
    /// into it.
    static LAST: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Bytes that one request asked for. What they are before they are written is not said.
#[derive(Debug, Default)]
pub struct Buffer(Vec<u8>, usize);

impl Buffer {
    /// A buffer of `len` bytes, to be filled.
    pub fn new(len: usize) -> Buffer {
        let mut memory = LAST.take();
        if memory.len() < len {
            memory.resize(len, 0);
        }
        if cfg!(debug_assertions) || cfg!(test) {
            // Who does not fill it is found by it.
            memory[..len].fill(0xa5);
        }
        Buffer(memory, len)
    }

    /// Cuts what was not filled.
    pub fn truncate(&mut self, len: usize) {
        self.1 = self.1.min(len);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        LAST.set(std::mem::take(&mut self.0));
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[..self.1]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0[..self.1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_that_was_asked_for() {
        let mut first = Buffer::new(1000);
        first.fill(7);
        let second = Buffer::new(10);
        assert_eq!((first.len(), second.len()), (1000, 10));
        drop((first, second));
        for len in [2000, 500, 0] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.len(), len);
            buffer.truncate(400);
            assert_eq!(buffer.len(), len.min(400));
        }
    }
}
