//! `vineyard-fs mv`: gives a dataset another name.

use super::store::{self, Conflict, Place};
use crate::error::{Kind, Result};

/// What `mv` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Dataset, by name or by the file name of a view
    pub old: String,
    /// Its new name; with a slash at the end, the directory to move it to
    pub new: String,
    /// What to do if the new name is taken
    #[arg(long, value_enum, default_value_t)]
    pub on_conflict: Conflict,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Renames.
///
/// # Errors
/// If there is no such dataset, or the new name is taken and may not be replaced.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open_to_change()?;
    // Between its steps the dataset has both names.
    store::catch_interrupts()?;
    let from = opened.fs.require(&opened.path(&arguments.old))?;
    let mut new = opened.new_path(&arguments.new)?;
    if new.ends_with('/') {
        new += &from.file_name(from.view);
    }
    let moved = opened.fs.change_name(&from, &new, arguments.on_conflict == Conflict::Replace);
    opened.warn();
    match moved {
        Err(error) if error.kind() == Kind::Exists && arguments.on_conflict == Conflict::Skip => {
            store::print(&format!("{error}: skipped\n"))
        }
        other => other.map(drop),
    }
}
