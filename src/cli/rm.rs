//! `vineyard-fs rm`: removes datasets.

use super::store::{self, Place};
use crate::error::{Error, Kind, Result};

/// What `rm` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Datasets, by name or by the file name of a view; all views go
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// All datasets whose names begin with NAME
    #[arg(long)]
    pub prefix: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Removes. What cannot be removed does not keep the rest.
///
/// # Errors
/// If something could not be removed.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open_to_change()?;
    let mut failures: Vec<Error> = Vec::new();
    for text in &arguments.names {
        let path = opened.path(text);
        let found = match arguments.prefix {
            // An empty prefix would be everything: that is asked for by a plain mistake more often than on purpose.
            true if path.is_empty() => Err(Error::new(Kind::Invalid, "an empty prefix would remove all datasets")),
            true => match opened.fs.datasets(&path) {
                Ok(found) if found.is_empty() => Err(Error::not_found(format!("no name begins with {path:?}"))),
                other => other,
            },
            false => opened.fs.require(&path).map(|named| vec![named]),
        };
        let removed = found.and_then(|found| found.iter().try_for_each(|named| opened.fs.remove(named)));
        failures.extend(removed.err());
    }
    opened.warn();
    let last = failures.pop();
    for failure in failures {
        eprintln!("vineyard-fs: {}", store::printable(&failure.to_string()));
    }
    last.map_or(Ok(()), Err)
}
