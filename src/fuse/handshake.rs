//! The INIT exchange, by hand: the keeper answers the kernel's INIT, so that every server starts from the same agreed
//! state with an INIT that the keeper's figures are put into.
//!
//! Layouts: `include/uapi/linux/fuse.h` of Linux 6.18. All integers are in native byte order.

use crate::error::{Error, Kind, Result};

const MAJOR: u32 = 7;
/// The newest minor version whose structures this program knows.
const MINOR: u32 = 40;
const OPCODE_INIT: u32 = 26;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const INIT_IN: usize = 64;
const INIT_OUT: usize = 64;

/// Bytes of one read or write request.
pub const MAX_WRITE: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
const MAX_BACKGROUND: u16 = 32;

/// Bits of INIT's flags, as `fuse.h` numbers them.
pub mod flag {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// What this program asks the kernel for. Inodes are immutable, so pages are dropped on request only; truncation comes
/// with the open; the kernel strips set-user-id bits, so that it need not ask for `security.capability` at each write.
/// The umask is applied here, because modes are a matter of mount options.
pub const WANTED: u64 = flag::ASYNC_READ
    | flag::ATOMIC_O_TRUNC
    | flag::BIG_WRITES
    | flag::DONT_MASK
    | flag::DO_READDIRPLUS
    | flag::ASYNC_DIO
    | flag::PARALLEL_DIROPS
    | flag::MAX_PAGES
    | flag::CACHE_SYMLINKS
    | flag::EXPLICIT_INVAL_DATA
    | flag::HANDLE_KILLPRIV_V2
    | flag::INIT_EXT
    | flag::DIRECT_IO_ALLOW_MMAP
    | flag::PASSTHROUGH
    | flag::HAS_RESEND;

/// `FUSE_NOTIFY_RESEND`: every request that was read and not answered comes again, with bit 63 set in its id.
pub const RESEND: [u8; OUT_HEADER] = resend();

const fn resend() -> [u8; OUT_HEADER] {
    let (length, code) = ((OUT_HEADER as u32).to_ne_bytes(), 7u32.to_ne_bytes());
    let mut bytes = [0; OUT_HEADER];
    let mut i = 0;
    while i < 4 {
        bytes[i] = length[i];
        bytes[4 + i] = code[i];
        i += 1;
    }
    bytes
}

/// The kernel's INIT request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    unique: u64,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

/// What keeper and kernel agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Minor version that the kernel speaks.
    pub minor: u32,
    /// Flags that both sides want.
    pub flags: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

/// Reads the first request of a connection.
///
/// # Errors
/// `Malformed` if it is not an INIT, `Unsupported` for a kernel older than Linux 5.4 (protocol 7.31).
pub fn parse(request: &[u8]) -> Result<Init> {
    let parse = || {
        let opcode = u32_at(request, 4)?;
        let unique = u64_at(request, 8)?;
        let major = u32_at(request, IN_HEADER)?;
        let minor = u32_at(request, IN_HEADER + 4)?;
        let max_readahead = u32_at(request, IN_HEADER + 8)?;
        let low = u32_at(request, IN_HEADER + 12)?;
        let high = if u64::from(low) & flag::INIT_EXT != 0 { u32_at(request, IN_HEADER + 16)? } else { 0 };
        let flags = u64::from(low) | u64::from(high) << 32;
        (opcode == OPCODE_INIT).then_some((major, Init { unique, minor, max_readahead, flags }))
    };
    let (major, init) = parse().ok_or_else(|| Error::malformed("the kernel's first request is not INIT"))?;
    if major != MAJOR || init.minor < 31 {
        let message =
            format!("this kernel speaks FUSE {major}.{}; 7.31 (Linux 5.4) or newer 7.x is needed", init.minor);
        return Err(Error::new(Kind::Unsupported, message));
    }
    Ok(init)
}

/// The answer to INIT, and what it settles.
pub fn answer(init: &Init) -> (Vec<u8>, Agreed) {
    let mut flags = init.flags & WANTED;
    // Without the extension bit the kernel ignores the upper half.
    if flags & flag::INIT_EXT == 0 {
        flags &= u64::from(u32::MAX);
    }
    let mut out = Vec::with_capacity(OUT_HEADER + INIT_OUT);
    out.extend(((OUT_HEADER + INIT_OUT) as u32).to_ne_bytes());
    out.extend(0i32.to_ne_bytes());
    out.extend(init.unique.to_ne_bytes());
    out.extend(MAJOR.to_ne_bytes());
    out.extend(init.minor.min(MINOR).to_ne_bytes());
    // The kernel takes the smaller of its own and this; it can be raised later only through the mount's bdi.
    out.extend(init.max_readahead.to_ne_bytes());
    out.extend((flags as u32).to_ne_bytes());
    out.extend(MAX_BACKGROUND.to_ne_bytes());
    out.extend((MAX_BACKGROUND * 3 / 4).to_ne_bytes());
    out.extend(MAX_WRITE.to_ne_bytes());
    out.extend(1u32.to_ne_bytes()); // time granularity in ns
    out.extend(MAX_PAGES.to_ne_bytes());
    out.extend(0u16.to_ne_bytes()); // map alignment
    out.extend(((flags >> 32) as u32).to_ne_bytes());
    out.extend(1u32.to_ne_bytes()); // stack depth: backing files lie on a file system that is not stacked
    out.resize(OUT_HEADER + INIT_OUT, 0);
    (out, Agreed { minor: init.minor, flags })
}

/// The INIT that a server's session gets instead of the kernel's.
pub fn synthetic(agreed: &Agreed) -> Vec<u8> {
    let mut request = Vec::with_capacity(IN_HEADER + INIT_IN);
    request.extend(((IN_HEADER + INIT_IN) as u32).to_ne_bytes());
    request.extend(OPCODE_INIT.to_ne_bytes());
    request.extend(1u64.to_ne_bytes()); // unique
    request.resize(IN_HEADER, 0);
    request.extend(MAJOR.to_ne_bytes());
    request.extend(agreed.minor.to_ne_bytes());
    request.extend((128u32 << 10).to_ne_bytes());
    request.extend((agreed.flags as u32 | flag::INIT_EXT as u32).to_ne_bytes());
    request.extend(((agreed.flags >> 32) as u32).to_ne_bytes());
    request.resize(IN_HEADER + INIT_IN, 0);
    request
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn kernel_init(minor: u32, flags: u64) -> Vec<u8> {
        let mut request = synthetic(&Agreed { minor, flags });
        request[8..16].copy_from_slice(&42u64.to_ne_bytes());
        let low = flags as u32;
        request[52..56].copy_from_slice(&low.to_ne_bytes());
        request
    }

    #[test]
    fn a_modern_kernel_gets_passthrough_and_no_writeback_cache() {
        let request = kernel_init(45, u64::MAX >> 20);
        assert_eq!(request.len(), 104);
        let init = parse(&request).unwrap();
        let (reply, agreed) = answer(&init);
        assert_eq!(reply.len(), 80);
        assert_eq!(reply[0..4], 80u32.to_ne_bytes());
        assert_eq!(reply[8..16], 42u64.to_ne_bytes());
        assert_eq!(reply[16..20], 7u32.to_ne_bytes());
        assert_eq!(reply[36..40], MAX_WRITE.to_ne_bytes());
        assert_eq!(reply[52..56], 1u32.to_ne_bytes(), "stack depth");
        assert_eq!(u32_at(&reply, 28).unwrap(), agreed.flags as u32);
        assert_eq!(u32_at(&reply, 48).unwrap(), (agreed.flags >> 32) as u32);
        assert!(agreed.flags & flag::PASSTHROUGH != 0);
        assert!(agreed.flags & (1 << 16) == 0, "writeback cache turns passthrough off");
        // What a server is told parses back to the same.
        let again = parse(&synthetic(&agreed)).unwrap();
        assert_eq!((again.minor, again.flags), (45, agreed.flags));
    }

    #[test]
    fn an_old_kernel_gets_what_it_offers() {
        let init = parse(&kernel_init(31, flag::ASYNC_READ | flag::DO_READDIRPLUS)).unwrap();
        let (_, agreed) = answer(&init);
        assert_eq!(agreed.flags, flag::ASYNC_READ | flag::DO_READDIRPLUS);
        assert_eq!(parse(&kernel_init(20, 0)).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn what_is_not_init_is_refused() {
        for length in 0..56 {
            assert!(parse(&kernel_init(31, 0)[..length]).is_err(), "{length} bytes");
        }
        let mut lookup = kernel_init(45, 0);
        lookup[4] = 1;
        assert!(parse(&lookup).is_err());
    }

    #[test]
    fn resend_is_a_notification_of_16_bytes() {
        assert_eq!(RESEND[..4], 16u32.to_ne_bytes());
        assert_eq!(RESEND[4..8], 7i32.to_ne_bytes());
        assert_eq!(RESEND[8..], [0; 8]);
    }
}
