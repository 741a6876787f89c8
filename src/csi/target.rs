//! Targets: the directories of pods that volumes are bind-mounted on. Everything about them is read from the list of
//! mounts; a target is looked at only where nothing is mounted on it.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tonic::Code;

use super::failure::{Failure, Outcome};
use super::record::Record;
use super::steps::{self, Step, Trouble};
use crate::error::{Context, Error};
use crate::fuse::mountinfo::{self, FS_TYPE, Mount};

/// A detached mount goes at once, whoever uses it.
const DETACH: Duration = Duration::from_secs(5);
/// Removing an empty directory of the mount is no condition for anything.
pub const REMOVE_PREFIX: Duration = Duration::from_secs(1);
/// Mounts on one target, at most: more are not taken away by one call.
const LAYERS: usize = 64;
/// Mounts on one target that are repaired by another one on top.
pub const REPAIRS: usize = 32;

/// Checks a target path by its text alone.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn check(target: &str, below: &Path) -> Outcome<PathBuf> {
    let path = Path::new(target);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if target.is_empty() {
        return Err(Failure::invalid("target_path is missing"));
    }
    if !path.is_absolute() || !plain || target.contains('\0') || path.file_name().is_none() {
        return Err(Failure::invalid(format!("target_path {target:?} is not an absolute path of a directory")));
    }
    if !path.starts_with(below) {
        let message = format!(
            "target_path {target:?} is not below {}: is --kubelet-dir (kubeletDir of the chart) the kubelet's \
             --root-dir?",
            below.display()
        );
        return Err(Failure::invalid(message));
    }
    Ok(path.to_owned())
}

/// The path as the list of mounts shows it; `None` if the folder above does not exist. The target itself is not
/// touched.
///
/// # Errors
/// If the folder above cannot be looked at.
pub fn resolve(target: &Path) -> Outcome<Option<PathBuf>> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Failure::invalid("target_path has no last part"));
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::from(error).into()),
    }
}

/// What is mounted on a target, the uppermost last.
///
/// # Errors
/// If the list of mounts cannot be read.
pub fn mounts(target: &Path) -> Outcome<Vec<Mount>> {
    let mut all = mountinfo::all()?;
    all.retain(|mount| mount.mountpoint == target);
    Ok(all)
}

/// Whether this program mounted it.
pub fn is_ours(mount: &Mount) -> bool {
    mount.fs_type == FS_TYPE
}

/// Makes the directory that nothing is mounted on, or finds it as it should be.
///
/// # Errors
/// `INVALID_ARGUMENT` if it is something else, `FAILED_PRECONDITION` if something is in it.
pub fn prepare(target: &Path) -> Outcome<()> {
    use std::os::unix::fs::DirBuilderExt;
    let at = target.display();
    match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(target);
            return Ok(made.context(|| format!("cannot make {at}"))?);
        }
        Err(error) => return Err(error).context(|| format!("cannot look at {at}")).map_err(Failure::from),
        Ok(metadata) if metadata.is_symlink() => {
            return Err(Failure::invalid(format!("target_path {at} is a symbolic link; a directory is needed")));
        }
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Failure::invalid(format!("target_path {at} is a file; a directory is needed")));
        }
        Ok(_) => {}
    }
    let mut entries = std::fs::read_dir(target).context(|| format!("cannot read {at}"))?;
    if entries.next().is_some() {
        let message = format!("target_path {at} is not empty, and what is in it would be hidden: remove it first");
        return Err(Failure::new(Code::FailedPrecondition, message));
    }
    Ok(())
}

/// Shows the record's part of `mount` at its target, on top of a dead mount that is there: a container's volume is a
/// part of that one, so what is mounted on it appears in the container, and what replaces it does not
/// (mount_namespaces(7)).
///
/// # Errors
/// `UNAVAILABLE` if the mount does not answer in time: another try may find another one.
pub fn bind(record: &Record, mount: &Path, until: Instant) -> Outcome<()> {
    // Each target propagates to its pod alone: what is mounted on it must not appear on the others. And where the mount
    // is not to be seen, this fails before anything is made in the bare directory.
    let mut plan = vec![Step::Private(steps::path(mount)?)];
    let mut from = mount.to_owned();
    let (mode, _) = record.key().modes();
    for part in record.attributes.prefix.iter().flat_map(|prefix| prefix.split('/')) {
        from.push(part);
        plan.push(Step::MakeDirectory { path: steps::path(&from)?, mode, group: record.group.unwrap_or(0) });
    }
    let bind = plan.len();
    let (from, to) = (steps::path(&from)?, steps::path(&record.target)?);
    plan.push(if record.read_only { Step::BindReadOnly { from, to } } else { Step::Bind { from, to } });
    let trouble = match steps::run(&plan, until)? {
        Ok(_) => return Ok(()),
        Err(trouble) => trouble,
    };
    let vineyard = &record.attributes.vineyard;
    Err(match (trouble, record.attributes.prefix.as_deref()) {
        (Trouble::Hung, _) => hung(record),
        (Trouble::Failed { errno: Errno::ENOTCONN | Errno::ECONNABORTED, .. }, _) => {
            let message = format!("the mount of vineyardd {vineyard} has just ended; trying again");
            Failure::new(Code::Unavailable, message)
        }
        (Trouble::Failed { step: 0, errno }, _) => {
            let message = format!(
                "the mount of vineyardd {vineyard} is not at {} as the node plugin sees it ({}); it may have just \
                 ended, else that folder of the node is missing in the plugin's pod",
                mount.display(),
                errno.desc()
            );
            Failure::new(Code::Unavailable, message)
        }
        (Trouble::Failed { step, errno: errno @ (Errno::ENOTDIR | Errno::EEXIST) }, Some(prefix)) if step <= bind => {
            let message = format!("prefix {prefix:?}: a part of it is a dataset, not a directory ({})", errno.desc());
            Failure::new(Code::FailedPrecondition, message)
        }
        // Somebody who sees all of the vineyardd may remove a directory that has just been made.
        (Trouble::Failed { step, errno: Errno::ENOENT }, Some(prefix)) if step <= bind => {
            let message = format!("the directory of prefix {prefix:?} has just been removed; trying again");
            Failure::new(Code::Unavailable, message)
        }
        (Trouble::Failed { step, errno }, Some(prefix)) if step < bind => {
            let message = format!("cannot make the directory of prefix {prefix:?}: {}", errno.desc());
            Failure::new(Code::Internal, message)
        }
        (Trouble::Failed { errno: Errno::ENOMEM | Errno::ENOSPC, .. }, _) => {
            Failure::new(Code::ResourceExhausted, "this node has no memory or no room for another mount")
        }
        (Trouble::Failed { errno, .. }, _) => {
            let message = format!("cannot mount on {}: {}", record.target.display(), errno.desc());
            Failure::new(Code::Internal, message)
        }
    })
}

/// Why a record's mount cannot be shown yet.
pub fn hung(record: &Record) -> Failure {
    let message = format!("the mount of vineyardd {} does not answer; trying again", record.attributes.vineyard);
    Failure::new(Code::Unavailable, message)
}

/// Takes away all that is mounted on a target, dead or alive.
///
/// # Errors
/// `INTERNAL` if something stays, which another call may take away.
pub fn unmount(target: &Path) -> Outcome<()> {
    let path = steps::path(target)?;
    for _ in 0..LAYERS {
        if mounts(target)?.is_empty() {
            return Ok(());
        }
        match steps::run(&[Step::Detach(path.clone())], Instant::now() + DETACH)? {
            Ok(_) => {}
            Err(trouble) => {
                let why = match trouble {
                    Trouble::Hung => "the kernel does not answer",
                    Trouble::Failed { errno, .. } => errno.desc(),
                };
                let message = format!("cannot unmount {}: {why}", target.display());
                return Err(Failure::new(Code::Internal, message));
            }
        }
    }
    Err(Failure::new(Code::Internal, format!("{} is still mounted", target.display())))
}

/// Removes the directories of a prefix from a mount, from the deepest up, while they are empty.
pub fn remove_prefix(prefix: &str, mount: &Path, until: Instant) {
    let parts: Vec<&str> = prefix.split('/').collect();
    let mut plan = Vec::new();
    for length in (1..=parts.len()).rev() {
        let path = parts.iter().take(length).fold(mount.to_owned(), |path, part| path.join(part));
        plan.extend(steps::path(&path).map(Step::RemoveDirectory));
    }
    match steps::run(&plan, until) {
        Ok(Ok(_) | Err(Trouble::Failed { errno: Errno::ENOTEMPTY | Errno::EBUSY, .. })) => {}
        other => tracing::info!("the directory of prefix {prefix:?} stays: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::csi::attributes::{Attributes, Format};

    #[test]
    fn target_paths_are_absolute_plain_and_below_the_kubelets_folder() {
        let below = Path::new("/var/lib/kubelet");
        assert!(check("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/v/mount", below).is_ok());
        for (wrong, what) in [
            ("", "missing"),
            ("var/lib/kubelet/x", "absolute"),
            ("/var/lib/kubelet/../x", "absolute"),
            ("/var/lib/kubelet/x\0", "absolute"),
            ("/", "absolute"),
            ("/etc/x", "kubeletDir"),
            ("/var/lib/kubelet2/x", "kubeletDir"),
        ] {
            let failure = check(wrong, below).unwrap_err();
            assert_eq!(failure.code, Code::InvalidArgument);
            assert!(failure.message.contains(what), "{wrong}: {}", failure.message);
        }
    }

    #[test]
    fn a_folder_without_its_mount_is_named_and_left_empty() {
        let folder = tempfile::tempdir().unwrap();
        let (mount, target) = (folder.path().join("mount"), folder.path().join("target"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::create_dir(&target).unwrap();
        for prefix in [None, Some("team/run-7".to_owned())] {
            let attributes = Attributes {
                vineyard: "a/b".parse().unwrap(),
                prefix,
                format: Format::Arrow,
                read_only: false,
                ephemeral: true,
            };
            let target = target.clone();
            let record = Record { volume: "v".into(), target, attributes, read_only: false, group: None };
            let failure = bind(&record, &mount, Instant::now() + DETACH).unwrap_err();
            assert_eq!(failure.code, Code::Unavailable);
            assert!(failure.message.contains(mount.to_str().unwrap()), "{}", failure.message);
            assert!(!failure.message.contains("prefix"), "{}", failure.message);
            assert_eq!(std::fs::read_dir(&mount).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_target_is_made_or_must_be_an_empty_directory() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        prepare(&at("a/b")).unwrap();
        prepare(&at("a/b")).unwrap();
        assert_eq!(prepare(&at("a")).unwrap_err().code, Code::FailedPrecondition);
        std::fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink(at("a/b"), at("link")).unwrap();
        assert_eq!(prepare(&at("file")).unwrap_err().code, Code::InvalidArgument);
        assert!(prepare(&at("link")).unwrap_err().message.contains("symbolic link"));
        assert_eq!(resolve(&at("none/x")).unwrap(), None);
        assert_eq!(resolve(&at("link")).unwrap(), Some(folder.path().canonicalize().unwrap().join("link")));
        unmount(&at("a")).unwrap();
    }
}
