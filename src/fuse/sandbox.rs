//! What a server may ask of the kernel: a list of system calls (seccomp), and files that it may read (Landlock).
//!
//! A server parses what others wrote. Should that go wrong, whoever is inside finds no privilege, no program to start, no
//! file to open for writing, and no process to look into. The server's descriptors are all it has: the connection to the
//! kernel, the keeper, the store's memory.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use serde::Serialize;

use crate::error::{Error, Kind, Result};

/// What holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sandbox {
    /// System calls are filtered.
    pub seccomp: bool,
    /// Files are out of reach: `full`, `partial` or `none`, as far as the kernel can.
    pub landlock: String,
    /// What is missing, and why.
    pub missing: Vec<String>,
}

/// Locks this process in, with all its threads to come. For use while there is one thread. What the kernel does not have
/// is left out and told.
pub fn enter() -> Sandbox {
    let mut sandbox = Sandbox { landlock: "none".into(), ..Sandbox::default() };
    match hide_files() {
        Ok(status) => {
            sandbox.landlock = match status {
                RulesetStatus::FullyEnforced => "full",
                RulesetStatus::PartiallyEnforced => "partial",
                RulesetStatus::NotEnforced => "none",
            }
            .into();
            if status == RulesetStatus::NotEnforced {
                sandbox.missing.push("this kernel has no Landlock (Linux 5.13), or it is switched off".into());
            }
        }
        Err(error) => sandbox.missing.push(format!("Landlock: {error}")),
    }
    match filter().and_then(|program| seccompiler::apply_filter(&program).map_err(refused)) {
        Ok(()) => sandbox.seccomp = true,
        Err(error) => sandbox.missing.push(format!("seccomp: {error}")),
    }
    sandbox
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::new(Kind::Unsupported, error.to_string())
}

/// Lets this process read below `/proc` (whether a writer is exiting is read there), and what resolving names needs;
/// nothing else, and nothing is written, made or removed by path.
fn hide_files() -> Result<RulesetStatus> {
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .map_err(refused)?
        .scope(Scope::from_all(abi))
        .map_err(refused)?;
    let mut created = ruleset.create().map_err(refused)?;
    for path in ["/proc", "/etc", "/run/systemd/resolve"] {
        // Where a folder does not exist nothing can be read.
        if let Ok(folder) = PathFd::new(path) {
            let rule = PathBeneath::new(folder, AccessFs::ReadFile | AccessFs::ReadDir);
            created = created.add_rule(rule).map_err(refused)?;
        }
    }
    Ok(created.restrict_self().map_err(refused)?.ruleset)
}

fn when(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(refused)
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule> {
    SeccompRule::new(conditions).map_err(refused)
}

/// The filter. Calls that are not in it answer ENOSYS, as on a kernel without them: libraries then do without.
fn filter() -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let always = [
        // Bytes through descriptors.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_lseek,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_copy_file_range,
        libc::SYS_splice,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_fcntl,
        libc::SYS_flock,
        libc::SYS_pipe2,
        libc::SYS_memfd_create,
        libc::SYS_ppoll,
        libc::SYS_getdents64,
        // Sockets that exist.
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
        libc::SYS_accept4,
        libc::SYS_shutdown,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        // Memory, apart from `mmap` and `mprotect`.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_mincore,
        libc::SYS_brk,
        // Threads and signals.
        libc::SYS_futex,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // Time, chance, and who one is.
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_gettimeofday,
        libc::SYS_getrandom,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_uname,
        libc::SYS_sysinfo,
    ];
    // An empty list of rules lets a call through whatever its arguments are.
    rules.extend(always.map(|call| (call, Vec::new())));
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_poll, Vec::new());

    // No memory can be executed that was not when the server began.
    let no_code = || Ok::<_, Error>(vec![rule(vec![when(2, masked(libc::PROT_EXEC), 0)?])?]);
    rules.insert(libc::SYS_mmap, no_code()?);
    rules.insert(libc::SYS_mprotect, no_code()?);
    // Threads, not processes. `clone3` keeps its flags in memory, out of sight: without it, `clone` is used.
    let thread = libc::CLONE_THREAD;
    rules.insert(libc::SYS_clone, vec![rule(vec![when(0, masked(thread), thread as u64)?])?]);
    // Reading only.
    let writing = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);
    rules.insert(libc::SYS_openat, vec![rule(vec![when(2, masked(writing), 0)?])?]);
    rules.insert(libc::SYS_prctl, vec![rule(vec![when(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?])?]);
    // `abort` signals its own process; limits are read, not set.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule(vec![when(0, SeccompCmpOp::Eq, own)?])?]);
    rules.insert(
        libc::SYS_prlimit64,
        vec![rule(vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0).map_err(refused)?])?],
    );
    // The end of a pair of datagram sockets could send to any path.
    let unix = when(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
    let packets = when(1, SeccompCmpOp::MaskedEq(0xf), libc::SOCK_SEQPACKET as u64)?;
    rules.insert(libc::SYS_socketpair, vec![rule(vec![unix, packets])?]);
    // Connections to other instances.
    let family = |family: i32| rule(vec![when(0, SeccompCmpOp::Eq, family as u64)?]);
    rules.insert(libc::SYS_socket, vec![family(libc::AF_INET)?, family(libc::AF_INET6)?]);
    rules.insert(libc::SYS_connect, Vec::new());
    // The resolver asks for two addresses at once, and how much has come.
    rules.insert(libc::SYS_sendmmsg, Vec::new());
    let command = |number: u64| rule(vec![when(1, SeccompCmpOp::Eq, number)?]);
    rules.insert(libc::SYS_ioctl, vec![command(libc::FIONBIO)?, command(libc::FIONREAD)?]);
    let target: TargetArch = std::env::consts::ARCH.try_into().map_err(refused)?;
    let otherwise = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, target).map_err(refused)?;
    filter.try_into().map_err(refused)
}

fn masked(bits: i32) -> SeccompCmpOp {
    SeccompCmpOp::MaskedEq(bits as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::process::{Command, Stdio};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    /// A name, whether it is allowed, and the attempt.
    type Attempt = (&'static str, bool, Box<dyn Fn() -> bool>);

    fn pair(flags: SockFlag) -> bool {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).is_ok()
    }

    /// What the child below tries, and whether it may.
    fn attempts() -> Vec<Attempt> {
        let call = |number: i64, arguments: [usize; 3]| {
            // SAFETY: none of the calls below writes to memory of this process; pointers are null or to constants.
            (unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) }) >= 0
        };
        let null = c"/dev/null".as_ptr() as usize;
        let own = std::process::id() as usize;
        vec![
            ("exec", false, Box::new(|| Command::new("/bin/true").status().is_ok())),
            ("fork", false, Box::new(move || call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0]))),
            ("ptrace", false, Box::new(move || call(libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0]))),
            ("mount", false, Box::new(move || call(libc::SYS_mount, [null, null, null]))),
            ("unshare", false, Box::new(move || call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0]))),
            ("bpf", false, Box::new(move || call(libc::SYS_bpf, [0, 0, 0]))),
            ("io_uring", false, Box::new(move || call(libc::SYS_io_uring_setup, [0, 0, 0]))),
            ("kill", false, Box::new(move || call(libc::SYS_kill, [own, 0, 0]))),
            ("read a file", false, Box::new(|| std::fs::read("/bin/sh").is_ok())),
            ("read a device", false, Box::new(|| std::fs::read("/dev/null").is_ok())),
            ("write a file", false, Box::new(|| std::fs::write("/dev/null", "x").is_ok())),
            (
                "remove a file",
                false,
                Box::new(|| {
                    std::fs::remove_file("/tmp/vineyard-fs-none")
                        .map_or_else(|error| error.raw_os_error() == Some(libc::ENOENT), |()| true)
                }),
            ),
            ("unix socket", false, Box::new(|| std::os::unix::net::UnixDatagram::unbound().is_ok())),
            ("datagram pair", false, Box::new(|| std::os::unix::net::UnixDatagram::pair().is_ok())),
            ("stream pair", false, Box::new(|| std::os::unix::net::UnixStream::pair().is_ok())),
            ("packet pair", true, Box::new(|| pair(SockFlag::SOCK_CLOEXEC) && pair(SockFlag::empty()))),
            ("listener", false, Box::new(|| std::net::TcpListener::bind("127.0.0.1:0").is_ok())),
            (
                "connection",
                true,
                Box::new(|| {
                    // Nobody listens there: the answer is no error of the filter.
                    let tried = std::net::TcpStream::connect("127.0.0.1:1");
                    tried.is_ok() || tried.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
                }),
            ),
            (
                "executable memory",
                false,
                Box::new(|| memmap2::MmapOptions::new().len(4096).map_anon().unwrap().make_exec().is_ok()),
            ),
            ("thread", true, Box::new(|| std::thread::spawn(|| 7).join().unwrap() == 7)),
            ("memory", true, Box::new(|| vec![1u8; 64 << 20].iter().map(|b| *b as usize).sum::<usize>() == 64 << 20)),
            ("read /proc", true, Box::new(|| std::fs::read_to_string("/proc/self/status").is_ok())),
            (
                "memory file",
                true,
                Box::new(|| nix::sys::memfd::memfd_create("x", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).is_ok()),
            ),
        ]
    }

    /// Runs in a process of its own, started by the test after it.
    #[test]
    #[ignore = "the_sandbox_holds runs it, in a process of its own: it locks its process in"]
    fn inside() {
        let sandbox = enter();
        let mut out = std::io::stderr();
        writeln!(out, "sandbox={}", serde_json::to_string(&sandbox).unwrap()).unwrap();
        for (name, _, attempt) in attempts() {
            writeln!(out, "{name}={}", attempt()).unwrap();
        }
    }

    fn results() -> BTreeMap<String, String> {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["fuse::sandbox::tests::inside", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    #[test]
    fn the_sandbox_holds() {
        let results = results();
        let sandbox: serde_json::Value = serde_json::from_str(&results["sandbox"]).unwrap();
        assert_eq!(sandbox["seccomp"], true, "{sandbox}");
        let hides = sandbox["landlock"] != "none";
        for (name, allowed, _) in attempts() {
            // Without Landlock ordinary files can be read.
            if hides || !name.starts_with("read a ") {
                assert_eq!(results[name], allowed.to_string(), "{name} in {results:?}");
            }
        }
    }
}
