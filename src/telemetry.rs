//! Logs: as text or JSON, on the standard error, which the keeper points at a file.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. `RUST_LOG` wins over `level`, which is a level or a filter such as `info,vineyard_fs::fs=debug`.
/// A second call does nothing.
pub fn init(format: Format, level: &str) {
    let text = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty()).unwrap_or_else(|| level.to_owned());
    let filter = EnvFilter::try_new(&text).unwrap_or_else(|_| EnvFilter::new("info"));
    // Every request is logged by this program itself. And a reply that the kernel does not want any more is no error;
    // one kind of reply provokes that on purpose.
    let quiet = ["fuser=warn", "fuser::reply=off"].iter().filter(|_| !text.contains("fuser"));
    let filter = quiet.filter_map(|directive| directive.parse().ok()).fold(filter, EnvFilter::add_directive);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let done = match format {
        Format::Text => builder.try_init(),
        Format::Json => builder.json().try_init(),
    };
    // Only a second call fails.
    drop(done);
}

/// Whether `level` is a level or a filter.
///
/// # Errors
/// What is wrong with it.
pub fn check(level: &str) -> Result<String, String> {
    // A filter takes a lone word that is no level for the name of a module.
    let known = |word: &&str| word.contains(['=', '[']) || word.parse::<tracing::metadata::LevelFilter>().is_ok();
    if let Some(word) = level.split(',').map(str::trim).find(|word| !known(word)) {
        return Err(format!(
            "{word:?} is no level: error, warn, info, debug, trace, off, or a filter such as info,vineyard_fs::fs=debug"
        ));
    }
    EnvFilter::try_new(level).map(|_| level.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_checked() {
        assert_eq!(check("debug"), Ok("debug".into()));
        assert!(check("info,vineyard_fs::fs=trace").is_ok());
        assert!(check("info,vineyard_fs=loudest").is_err());
        for wrong in ["zzz", "info,zzz", "warning"] {
            assert!(check(wrong).unwrap_err().contains("debug, trace"), "{wrong}");
        }
    }
}
