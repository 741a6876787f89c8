//! File names with `%`: each is that of one name, here and on other mounts.

use super::super::*;
use super::bed::*;
use super::*;

/// What programs may call a file, and what reads like the escaped form of something. `%2F` stands for the empty part of a
/// name; in the root it is that of the empty name, which no dataset can have.
const COMPONENTS: [&str; 18] = [
    "k=a%2Fb",
    "k=%2541",
    "k=50%",
    "k=50%25",
    "50%2525",
    "a%252Fb",
    "%",
    "%25",
    "%252F",
    "%2Fx",
    "%252Fx",
    "%2E",
    "%252E%252E",
    "%2e",
    "x%00y",
    "x%2500y",
    "q%~0123456789abcdef",
    "q%25~0123456789abcdef",
];

/// Another mount of a bed's store.
fn other_mount(bed: &Bed) -> Bed {
    let host = Arc::new(LocalHost { store: Some(bed.store.clone()), ..LocalHost::default() });
    Bed::of(FileSystem::new(bed.store.clone(), host.clone(), Options::default()), bed.store.clone(), host)
}

fn sorted(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    names.sort();
    names
}

#[test]
fn files_are_called_what_programs_call_them() {
    for folder in ["", "sub/"] {
        for suffix in ["", ".arrow"] {
            let bed = bed();
            if !folder.is_empty() {
                bed.fs.mkdir(ROOT, OsStr::new("sub"), 0o755, 0, ME).unwrap();
            }
            for (number, name) in COMPONENTS.iter().enumerate() {
                bed.save(&format!("{folder}{name}{suffix}"), &table_file(&[number as i64])).unwrap();
            }
            let names = sorted(COMPONENTS.map(|name| format!("{name}{suffix}")));
            for mount in [&bed, &other_mount(&bed)] {
                assert_eq!(mount.list(folder.trim_end_matches('/')), names);
                for (number, name) in COMPONENTS.iter().enumerate() {
                    let path = format!("{folder}{name}{suffix}");
                    assert_eq!(column(&mount.load(&path).unwrap()), [number as i64], "{path}");
                }
            }
            let (parent, _) = bed.walk(&format!("{folder}x")).unwrap();
            for name in &names {
                bed.fs.unlink(parent, OsStr::new(name), ME).unwrap();
            }
            assert_eq!((bed.list(folder.trim_end_matches('/')), bed.store.object_count()), (Vec::new(), 0));
        }
    }
}

#[test]
fn directories_are_called_what_programs_call_them() {
    for folder in ["", "sub/"] {
        let bed = bed();
        if !folder.is_empty() {
            bed.fs.mkdir(ROOT, OsStr::new("sub"), 0o755, 0, ME).unwrap();
        }
        let (parent, _) = bed.walk(&format!("{folder}x")).unwrap();
        for name in COMPONENTS {
            bed.fs.mkdir(parent, OsStr::new(name), 0o755, 0, ME).unwrap();
        }
        let here = folder.trim_end_matches('/');
        assert_eq!(bed.list(here), sorted(COMPONENTS.map(str::to_owned)));
        for name in COMPONENTS {
            assert_eq!(bed.list(&format!("{folder}{name}")), [""; 0], "{folder}{name} is empty");
            bed.save(&format!("{folder}{name}/{name}"), name.as_bytes()).unwrap();
        }
        for mount in [&bed, &other_mount(&bed)] {
            assert_eq!(mount.list(here), sorted(COMPONENTS.map(str::to_owned)));
            for name in COMPONENTS {
                let directory = format!("{folder}{name}");
                assert_eq!(mount.list(&directory), [name], "{directory}");
                assert_eq!(mount.load(&format!("{directory}/{name}")).unwrap(), name.as_bytes());
            }
        }
        for name in COMPONENTS {
            let (directory, file) = bed.walk(&format!("{folder}{name}/{name}")).unwrap();
            bed.fs.unlink(directory, &file, ME).unwrap();
            bed.fs.rmdir(parent, OsStr::new(name), ME).unwrap();
        }
        assert_eq!(bed.list(here), [""; 0]);
    }
}

#[test]
fn names_of_other_clients_that_read_like_escapes_are_listed_and_open() {
    let bed = bed();
    let names = ["a", "%2F", "/x", "%2Fx", "n\0", "n%00", "n%2500", "d/", "d/%2F", "d/%252F", "d/%2Fx", "..", "%2E%2E"];
    for (number, name) in names.iter().enumerate() {
        bed.put_tensor(name, &[number as f64]);
    }
    let listed = ["%252F", "%252Fx", "%2Fx", "a", "n%00", "n%2500", "n%252500", ".", "%2E%2E"];
    let files = listed.map(|name| if name == "." { "...npy".to_owned() } else { format!("{name}.npy") });
    assert_eq!(bed.list(""), sorted(files.into_iter().chain(["d".to_owned()])));
    assert_eq!(bed.list("d"), ["%25252F.npy", "%252F.npy", "%2F.npy", "%2Fx.npy"]);
    for (path, number) in [("%252Fx", 3), ("n%2500", 5), ("%2E%2E", 12), ("..", 11), ("d/%2F", 7), ("d/%252F", 8)] {
        let bytes = bed.load(&format!("{path}.npy")).unwrap();
        assert_eq!(bytes[bytes.len() - 8..], f64::from(number).to_le_bytes(), "{path}");
    }
}

#[test]
fn a_file_under_a_shortened_name_replaces_the_dataset_of_that_name() {
    let bed = bed();
    let long = "n".repeat(300);
    bed.put_tensor(&long, &[1.0]);
    let [file] = &*bed.list("") else { panic!() };
    let value =
        |bed: &Bed, name: &str| bed.load(name).unwrap().last_chunk::<8>().map(|bytes| f64::from_le_bytes(*bytes));
    let mut bytes = bed.load(file).unwrap();
    let end = bytes.len() - 8;
    bytes[end..].copy_from_slice(&2f64.to_le_bytes());
    bed.save(file, &bytes).unwrap();
    assert_eq!((bed.list(""), value(&bed, file)), (vec![file.clone()], Some(2.0)));
    let mount = other_mount(&bed);
    assert_eq!((mount.list(""), value(&mount, file)), (vec![file.clone()], Some(2.0)));

    // The server is killed while it is written once more.
    bytes[end..].copy_from_slice(&3f64.to_le_bytes());
    let writer = bed.create(file, ME).unwrap();
    let Bed { fs, store, host, .. } = bed;
    std::mem::forget(fs);
    let fs = FileSystem::new(store.clone(), host.clone(), Options::default());
    fs.adopt();
    let bed = Bed::of(fs, store, host);
    bed.write(writer, 0, &bytes);
    bed.close(writer, ME).unwrap();
    let mount = other_mount(&bed);
    assert_eq!((mount.list(""), value(&mount, file)), (vec![file.clone()], Some(3.0)));
    bed.save("other.npy", &bytes).unwrap();
    bed.fs.rename(ROOT, OsStr::new("other.npy"), ROOT, OsStr::new(file), 0, ME).unwrap();
    assert_eq!((bed.list(""), bed.store.object_count()), (vec![file.clone()], 1));
    assert_eq!(bed.fs.datasets("").unwrap()[0].name, long);

    // Another client puts one whose own name reads like that file's.
    let own = file.strip_suffix(".npy").unwrap();
    bed.put_tensor(own, &[4.0]);
    let mut files = bed.list("");
    assert_eq!(files.len(), 2);
    files.retain(|name| name != file);
    assert_eq!((value(&bed, file), value(&bed, &files[0])), (Some(3.0), Some(4.0)));
}

#[test]
fn who_looks_at_files_of_a_long_listing_gets_attributes_with_those_that_follow() {
    let options = Options { listing_wait_names: 0, listing_budget: Duration::ZERO, ..Options::default() };
    let bed = bed_with(false, options);
    for number in 0..300 {
        bed.put_tensor(&format!("long/{number:03}"), &vec![0.5; number + 1]);
    }
    let ino = bed.lookup("long", ME).unwrap().attr.ino;
    let fh = bed.fs.opendir(ino).unwrap();
    let read = |offset: u64, most: usize| {
        let mut got = Vec::new();
        let mut add = |entry: DirEntry| {
            let full = got.len() == most;
            if !full {
                got.push((entry.next, entry.name.into_string().unwrap(), entry.entry.map(|entry| entry.attr.size)));
            }
            full
        };
        bed.fs.readdir(ino, fh, offset, true, &mut add).unwrap();
        got
    };
    // Names alone ask nothing.
    let asked = bed.store.calls(Op::Metas);
    let all = read(2, 1000);
    assert_eq!(all.len(), 300);
    assert!(all.iter().all(|(_, name, size)| size.is_none() && name.len() == 3));
    assert_eq!(bed.store.calls(Op::Metas), asked);
    // As `ls -l` does: the first one is looked up.
    let first = &all[0];
    bed.lookup(&format!("long/{}", first.1), ME).unwrap();
    let asked = bed.store.calls(Op::Metas);
    let mut got = read(first.0, 199);
    got.extend(read(got.last().unwrap().0, 1000));
    assert_eq!(got.len(), 299);
    for (_, name, size) in got {
        let looked_up = bed.lookup(&format!("long/{name}"), ME).unwrap().attr.size;
        assert_eq!(size, Some(looked_up), "{name}");
    }
    assert!(bed.store.calls(Op::Metas) - asked <= 2 * 4, "{} questions", bed.store.calls(Op::Metas) - asked);
    bed.fs.releasedir(ino, fh);
}
