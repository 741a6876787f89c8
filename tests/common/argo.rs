//! Argo's own linter.

use std::ffi::OsString;
use std::process::Command;

/// The command of Argo Workflows: what `VINEYARD_FS_ARGO` names, else `argo` on the `PATH`. Says so if there is none.
pub fn program() -> Option<OsString> {
    if let Some(named) = std::env::var_os("VINEYARD_FS_ARGO").filter(|named| !named.is_empty()) {
        return Some(named);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("argo")).find(|file| file.is_file());
    if found.is_none() {
        println!("left out: argo lint (no argo on the PATH, and VINEYARD_FS_ARGO does not name it)");
    }
    found.map(Into::into)
}

/// Checks a workflow without a cluster.
///
/// # Errors
/// What argo says, if it has something against it.
pub fn lint(argo: &OsString, workflow: &[u8]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("argo.yml");
    std::fs::write(&file, workflow).unwrap();
    let output = Command::new(argo).args(["lint", "--offline", "--no-color"]).arg(file).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(()) } else { Err(said) }
}
