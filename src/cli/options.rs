//! Sizes, modes and the `-o` options of mount(8).

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::mount::Args;
use crate::error::{Error, Kind, Result};
use crate::fs::ServePolicy;
use crate::fuse::mount::FLAGS;
use crate::image::View;
use crate::vineyard::RemotePolicy;

/// Reads a size: a number with an optional unit (`K`, `M`, `G`, `T`, each also with `i`, `B` or `iB`; powers of 1024),
/// or `N%` of the memory that this process may use.
///
/// # Errors
/// What is wrong with it.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 512M, 4Gi or 25%");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "ki" | "kb" | "kib" => 1024.0,
        "m" | "mi" | "mb" | "mib" => 1024f64.powi(2),
        "g" | "gi" | "gb" | "gib" => 1024f64.powi(3),
        "t" | "ti" | "tb" | "tib" => 1024f64.powi(4),
        "%" => crate::cgroup::whole_memory().map_err(|error| error.to_string())? as f64 / 100.0,
        _ => return Err(wrong()),
    };
    let bytes = number * factor;
    if bytes.is_finite() && (1.0..=9e18).contains(&bytes) { Ok(bytes as u64) } else { Err(wrong()) }
}

/// Reads permission bits, in octal.
///
/// # Errors
/// What is wrong with them.
pub fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("{text:?} is not a mode such as 0755")),
    }
}

/// Reads a time: seconds, or a number with `ms`, `s` or `m`. In milliseconds.
///
/// # Errors
/// What is wrong with it.
pub fn millis(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" | "s" => Some(1000),
        "ms" => Some(1),
        "m" => Some(60_000),
        _ => None,
    };
    let value = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    value.filter(|millis| *millis > 0).ok_or_else(|| format!("{text:?} is not a time such as 10s or 500ms"))
}

fn policy(text: &str) -> Option<ServePolicy> {
    match text {
        "auto" => Some(ServePolicy::Auto),
        "lazy" => Some(ServePolicy::Lazy),
        "assembled" => Some(ServePolicy::Assembled),
        _ => None,
    }
}

/// Reads a [`ServePolicy`]: by what is known of a dataset, always read by read, or always as a memory file.
pub fn serve() -> impl TypedValueParser<Value = ServePolicy> {
    let names = PossibleValuesParser::new(["auto", "lazy", "assembled"]);
    names.try_map(|text| policy(&text).ok_or("not a way to serve"))
}

fn remote_policy(text: &str) -> Option<RemotePolicy> {
    match text {
        "lazy" => Some(RemotePolicy::Lazy),
        "full" => Some(RemotePolicy::Full),
        "never" => Some(RemotePolicy::Never),
        _ => None,
    }
}

/// Reads a [`RemotePolicy`]: whether data of other instances is brought here.
pub fn migrate() -> impl TypedValueParser<Value = RemotePolicy> {
    PossibleValuesParser::new(["lazy", "full", "never"])
        .try_map(|text| remote_policy(&text).ok_or("not a way to migrate"))
}

fn table(text: &str) -> Option<View> {
    [View::Arrow, View::Feather, View::Parquet].into_iter().find(|view| view.extension() == Some(text))
}

/// Reads the view that listings show of tables.
pub fn table_view() -> impl TypedValueParser<Value = View> {
    PossibleValuesParser::new(["arrow", "feather", "parquet"]).try_map(|text| table(&text).ok_or("not a format"))
}

/// Puts the options of `-o` into the arguments. What mount(8) knows and this program does not do is warned of.
///
/// # Errors
/// `Invalid` for what is unknown or malformed.
pub fn apply(arguments: &mut Args) -> Result<()> {
    for option in std::mem::take(&mut arguments.options).iter().flat_map(|list| split(list)) {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option.as_str(), None),
        };
        one(arguments, key, value).map_err(|what| Error::new(Kind::Invalid, format!("option -o {option}: {what}")))?;
    }
    Ok(())
}

/// Splits at commas that have no backslash before them.
fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in list.chars() {
        match (c, escaped) {
            ('\\', false) => escaped = true,
            (',', false) => parts.push(String::new()),
            (c, _) => {
                if escaped && c != ',' && c != '\\' {
                    parts.last_mut().into_iter().for_each(|part| part.push('\\'));
                }
                parts.last_mut().into_iter().for_each(|part| part.push(c));
                escaped = false;
            }
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn one(arguments: &mut Args, key: &str, value: Option<&str>) -> Result<(), String> {
    let text = || value.filter(|v| !v.is_empty()).map(str::to_owned).ok_or_else(|| "needs a value".to_owned());
    let number = || text()?.parse().map_err(|_| "needs a number".to_owned());
    let flags = &mut arguments.flags;
    let choice = |what: &str| format!("needs one of {what}");
    match key {
        "ro" => arguments.read_only = true,
        "rw" => arguments.read_only = false,
        "allow_other" => arguments.no_allow_other = false,
        "no_allow_other" => arguments.no_allow_other = true,
        "nonempty" => arguments.nonempty = true,
        "socket" => arguments.socket = Some(PathBuf::from(text()?)),
        "vineyardd" => arguments.vineyardd = Some(PathBuf::from(text()?)),
        "size" => arguments.size = Some(size(&text()?)?),
        "prefix" => arguments.prefix = Some(text()?),
        "cache_size" | "cache-size" => arguments.cache_size = Some(size(&text()?)?),
        "staging_size" | "staging-size" => arguments.staging_size = Some(size(&text()?)?),
        "serve" => {
            arguments.serve = policy(&text()?).ok_or_else(|| choice("auto, lazy, assembled"))?;
        }
        "migrate" => {
            arguments.migrate = remote_policy(&text()?).ok_or_else(|| choice("lazy, full, never"))?;
        }
        "format" => {
            arguments.format = table(&text()?).ok_or_else(|| choice("arrow, feather, parquet"))?;
        }
        "log_file" | "log-file" => arguments.log_file = Some(PathBuf::from(text()?)),
        "log_level" | "log-level" => arguments.log_level = crate::telemetry::check(&text()?)?,
        "log_format" | "log-format" => {
            let format = <crate::telemetry::Format as clap::ValueEnum>::from_str(&text()?, false);
            arguments.log_format = format.map_err(|_| choice("text, json"))?;
        }
        "uid" => arguments.uid = Some(number()?),
        "gid" => arguments.gid = Some(number()?),
        "dir_mode" | "dir-mode" => arguments.dir_mode = mode(&text()?)?,
        "file_mode" | "file-mode" => arguments.file_mode = mode(&text()?)?,
        "metrics" => {
            arguments.metrics = Some(text()?.parse().map_err(|_| "needs an address such as 127.0.0.1:9464")?);
        }
        "deadline" => arguments.deadline = millis(&text()?)?,
        flag if FLAGS.iter().any(|(name, ..)| *name == flag) => {
            flags.retain(|other| other != flag);
            flags.push(flag.to_owned());
        }
        "exec" => flags.retain(|flag| flag != "noexec"),
        "atime" => flags.retain(|flag| flag != "noatime"),
        "diratime" => flags.retain(|flag| flag != "nodiratime"),
        "norelatime" => flags.retain(|flag| flag != "relatime"),
        "nostrictatime" => flags.retain(|flag| flag != "strictatime"),
        // What mount(8) and systemd use themselves, and what is so in any case. mount.fuse3 adds `dev` and `suid` for
        // root by itself, and no mount of this program is either.
        "defaults"
        | "auto"
        | "noauto"
        | "user"
        | "users"
        | "nouser"
        | "owner"
        | "group"
        | "_netdev"
        | "nofail"
        | "dev"
        | "nodev"
        | "suid"
        | "nosuid"
        | "async"
        | "dirsync"
        | "nolazytime"
        | "default_permissions"
        | "loud"
        | "silent"
        | "noiversion"
        | "nomand"
        | "comment" => {}
        // The kernel heeds it where this program sees each write, and would have half a file published by each.
        "sync" => eprintln!("vineyard-fs: warning: option -o sync does nothing here: `close` and `fsync` publish"),
        "lazytime" | "iversion" | "mand" | "nosymfollow" | "subtype" | "fsname" => {
            eprintln!("vineyard-fs: warning: option -o {key} does nothing here");
        }
        key if key.starts_with("x-") || key.starts_with("X-") => {}
        _ => return Err("is not known; see `vineyard-fs mount --help`".into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &[&str]) -> Args {
        Line::parse_from([&["mount", "/mnt/v"], line].concat()).args
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("2m"), Ok(2 << 20));
        assert!(size("50%").unwrap() < crate::cgroup::whole_memory().unwrap());
        for wrong in ["", "G", "-1G", "1X", "1e3", "0", "99999999999T", "1..2"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn modes_and_times_are_read() {
        assert_eq!((mode("0755"), mode("644")), (Ok(0o755), Ok(0o644)));
        assert!(mode("888").is_err() && mode("4755").is_err());
        assert_eq!((millis("10"), millis("250ms"), millis("2m")), (Ok(10_000), Ok(250), Ok(120_000)));
        assert!(millis("0").is_err() && millis("1h").is_err() && millis("").is_err());
    }

    #[test]
    fn options_of_fstab_reach_the_arguments() {
        let list = "rw,noatime,_netdev,x-systemd.automount,ro,prefix=a\\,b,uid=5,file_mode=0400,cache_size=1G,serve=lazy,migrate=never";
        let mut args = args(&["-o", list, "-o", "socket=/run/v.sock,no_allow_other"]);
        apply(&mut args).unwrap();
        assert!(args.read_only && args.no_allow_other);
        assert_eq!(args.prefix.as_deref(), Some("a,b"));
        assert_eq!((args.uid, args.file_mode, args.cache_size), (Some(5), 0o400, Some(1 << 30)));
        assert_eq!((args.serve, args.migrate), (ServePolicy::Lazy, RemotePolicy::Never));
        assert_eq!(args.socket, Some("/run/v.sock".into()));
    }

    #[test]
    fn of_two_options_that_exclude_each_other_the_last_one_counts() {
        let flags = |list| {
            let mut args = args(&["-o", list]);
            apply(&mut args).unwrap();
            args.flags
        };
        assert_eq!(flags("noexec,noatime,nodiratime,relatime,noexec").len(), 4);
        assert_eq!(flags("noexec,exec,sync,async,suid,dev"), Vec::<String>::new());
        assert_eq!(flags("atime,noatime,exec,noexec"), ["noatime", "noexec"]);
        assert_eq!(flags("lazytime,mand"), Vec::<String>::new());
    }

    #[test]
    fn unknown_options_are_named() {
        for (list, what) in [
            ("speed=11", "speed=11"),
            ("uid=me", "number"),
            ("prefix", "value"),
            ("serve=x", "lazy"),
            ("migrate=x", "never"),
        ] {
            let mut args = args(&["-o", list]);
            let error = apply(&mut args).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}
