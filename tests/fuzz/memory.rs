//! An allocator that counts, so that an input which makes the program take memory without bound is found.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes that all targets together may hold.
const MOST: usize = 3 << 30;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

pub struct Counting;

fn take(size: usize) -> bool {
    // What is refused never counts, or another thread would be refused for it.
    let within = |held: usize| held.checked_add(size).filter(|held| *held <= MOST);
    match HELD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
        Ok(before) => PEAK.fetch_max(before + size, Ordering::Relaxed),
        Err(_) => return false,
    };
    true
}

// SAFETY: all work is the system allocator's; a null pointer says that there is no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Most bytes that were held at one time.
pub fn peak() -> usize {
    PEAK.load(Ordering::Relaxed)
}
