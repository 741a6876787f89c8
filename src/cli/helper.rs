//! The way `mount(8)` calls: `vineyard-fs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS]`, from `mount -t fuse.vineyard-fs` and
//! `/etc/fstab`. It becomes `vineyard-fs mount --source SOURCE MOUNTPOINT -o OPTIONS`.

use std::ffi::OsString;

/// Subcommands, and what else stands in the first place of an ordinary command line.
fn is_ordinary(first: &OsString) -> bool {
    use clap::CommandFactory;
    let Some(first) = first.to_str() else { return false };
    let command = super::Cli::command();
    let known =
        command.get_subcommands().any(|sub| sub.get_name() == first || sub.get_all_aliases().any(|a| a == first));
    first == "help" || first.starts_with('-') || known
}

/// Puts the words of a call by `mount(8)` in order; leaves all other command lines alone.
pub fn translate(arguments: Vec<OsString>) -> Vec<OsString> {
    let helper = matches!(arguments.first().and_then(|name| name.to_str()),
        Some(name) if name.rsplit('/').next().is_some_and(|base| base.starts_with("mount.")));
    match arguments.get(1) {
        Some(first) if (helper || !is_ordinary(first)) && arguments.len() >= 3 => {}
        _ => return arguments,
    }
    let mut words = arguments.into_iter();
    let mut out: Vec<OsString> = words.next().into_iter().collect();
    out.extend(["mount".into(), "--source".into()]);
    out.extend(words.next());
    let mut rest = words.peekable();
    while let Some(word) = rest.next() {
        match word.to_str() {
            // Sloppy, no mtab, verbose: nothing to do. A fake mount (-f) does nothing at all, which `mount` does itself.
            Some("-s" | "-n" | "-v" | "-sn" | "-nv" | "-sv") => {}
            // The type that was asked for, and a namespace: known already.
            Some("-t" | "-N") => drop(rest.next()),
            _ => out.push(word),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        translate(line.split(' ').map(OsString::from).collect())
    }

    #[test]
    fn calls_by_mount_become_the_subcommand() {
        let expected: Vec<OsString> =
            "vineyard-fs mount --source /run/v.sock /mnt/v -o ro,prefix=a".split(' ').map(Into::into).collect();
        assert_eq!(words("vineyard-fs /run/v.sock /mnt/v -o ro,prefix=a"), expected);
        assert_eq!(words("vineyard-fs /run/v.sock /mnt/v -n -o ro,prefix=a"), expected);
        assert_eq!(words("/sbin/mount.fuse.vineyard-fs none /mnt/v -o rw -t fuse.vineyard-fs").len(), 7);
    }

    #[test]
    fn ordinary_command_lines_stay() {
        for line in
            ["vineyard-fs", "vineyard-fs mount /mnt/v", "vineyard-fs --help", "vineyard-fs umount /m", "vineyard-fs x"]
        {
            let same: Vec<OsString> = line.split(' ').map(Into::into).collect();
            assert_eq!(words(line), same);
        }
    }
}
