//! Giving up privileges: a server that parses foreign data needs none.

use nix::unistd::{Gid, Pid, Uid, getppid, setgroups, setresgid, setresuid};

use crate::error::{Context, Error, Kind, Result};

/// User and group "nobody", which own nothing.
const NOBODY: u32 = 65534;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> Result<()> {
    // SAFETY: the options used here take a number and touch no memory of this process.
    match unsafe { libc::prctl(option, value, 0 as libc::c_ulong, 0 as libc::c_ulong, 0 as libc::c_ulong) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(()),
    }
}

/// Allows this process as many open files as it may have.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, most, most).ok();
    }
}

/// Makes this process nobody: no supplementary groups, no capability that could come back, no new privileges through
/// `exec`. For use before other threads exist. Where users cannot be changed (a user namespace that maps only one) the
/// capabilities still go.
///
/// # Errors
/// If privileges would remain.
pub fn drop_all() -> Result<()> {
    if Uid::effective().is_root() {
        // The bounding set first: that needs a capability. Numbers past the last capability answer EINVAL.
        for capability in 0..64 {
            if prctl(libc::PR_CAPBSET_DROP, capability).is_err() {
                break;
            }
        }
        let nobody = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        let changed = setgroups(&[])
            .and_then(|()| setresgid(nobody.1, nobody.1, nobody.1))
            .and_then(|()| setresuid(nobody.0, nobody.0, nobody.0));
        if let Err(errno) = changed {
            tracing::warn!("the server keeps its user: {}", errno.desc());
        }
    }
    let header = CapHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let none = [CapData { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: version 3 of capset(2) reads one header and two data records, which live until after the call.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) } == -1 {
        return Err(Error::from(std::io::Error::last_os_error())).context(|| "cannot drop capabilities".into());
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).context(|| "cannot refuse new privileges".into())
}

/// Gives this process, which was started through `/proc/self/exe`, its name back.
pub fn take_name() {
    // SAFETY: the name is a terminated string of at most 16 bytes, which the call copies.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"vineyard-fs".as_ptr()) };
}

/// Ends this process with its parent, which must be `parent`. A change of user resets this, so it comes last.
///
/// # Errors
/// `Unavailable` if the parent has gone already.
pub fn end_with_parent(parent: u32) -> Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
    match i32::try_from(parent) {
        Ok(parent) if getppid() == Pid::from_raw(parent) => Ok(()),
        _ => Err(Error::new(Kind::Unavailable, "the keeper has gone")),
    }
}
