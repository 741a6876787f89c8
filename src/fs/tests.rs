//! The filesystem without a mount.

mod appends;
mod away;
mod bed;
mod claims;
mod directories;
mod formers;
mod held;
mod kills;
mod model;
mod moves;
mod names;
mod opens;
mod others;
mod retries;
#[cfg(feature = "shuttle")]
mod schedules;
#[cfg(feature = "shuttle")]
mod schedules_of_appends;
#[cfg(feature = "shuttle")]
mod schedules_of_claims;
#[cfg(feature = "shuttle")]
mod schedules_of_directories;
#[cfg(feature = "shuttle")]
mod schedules_of_successors;
mod successors;
mod versions;

use std::ffi::OsStr;
use std::sync::Arc;

use serde_json::json;

use self::bed::*;
use super::*;
use crate::vineyard::fake::Op;

#[test]
fn datasets_of_other_clients_are_files() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let values: Vec<f64> = (0..20_000).map(f64::from).collect();
        bed.put_tensor("x", &values);
        bed.put_tensor("deep/er/y", &[1.5]);
        assert_eq!(bed.list(""), ["deep", "x.npy"]);
        assert_eq!(bed.list("deep"), ["er"]);
        assert_eq!(bed.list("deep/er"), ["y.npy"]);
        let bytes = bed.load("x.npy").unwrap();
        assert_eq!(&bytes[..6], b"\x93NUMPY");
        assert_eq!(bytes[bytes.len() - 8..], 19_999f64.to_le_bytes());
        let rows = bed.load("x.arrow").unwrap();
        assert!(rows.starts_with(b"ARROW1") && rows.ends_with(b"ARROW1"));
        assert_eq!(bed.load("nothing.arrow").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(bed.load("x.pkl").unwrap_err().kind(), Kind::NotFound);
    }
}

#[test]
fn what_was_written_reads_back_byte_for_byte_and_through_other_views() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let file = table_file(&[3, 1, 2]);
        bed.save("t.arrow", &file).unwrap();
        assert_eq!(bed.load("t.arrow").unwrap(), file);
        assert_eq!(column(&bed.load("t.feather").unwrap()), [3, 1, 2]);
        assert_eq!(bed.list(""), ["t.arrow"]);
        // Another mount of the same store has only the store to make it from.
        let host = Arc::new(LocalHost { passthrough, next: AtomicU64::new(1), ..LocalHost::default() });
        let fs = FileSystem::new(bed.store.clone(), host.clone(), Options::default());
        let second = Bed::of(fs, bed.store.clone(), host);
        assert_eq!(second.load("t.arrow").unwrap(), file);
        assert_eq!(second.list(""), ["t.arrow"]);
    }
}

#[test]
fn plain_files_and_foreign_bytes_are_kept_as_they_are() {
    let bed = bed();
    bed.save("report.csv", b"a,b\n1,2\n").unwrap();
    bed.save("x.arrow", b"no arrow file at all").unwrap();
    bed.save("empty", b"").unwrap();
    // Zeros may be what a file is made of, too: they are in the store.
    for name in ["z.arrow", "z.parquet", "z.npy", "z.pkl"] {
        bed.save(name, &[0; 20]).unwrap();
        assert_eq!(bed.fs.object_of(name).unwrap().map(|_| bed.load(name).unwrap()), Some(vec![0; 20]), "{name}");
        bed.fs.unlink(ROOT, OsStr::new(name), ME).unwrap();
    }
    assert_eq!(bed.load("report.csv").unwrap(), b"a,b\n1,2\n");
    assert_eq!(bed.load("x.arrow").unwrap(), b"no arrow file at all");
    assert_eq!(bed.load("empty").unwrap(), b"");
    assert_eq!(bed.list(""), ["empty", "report.csv", "x.arrow"]);
    // The same path with real content is a dataset again, and nothing of the former value is left.
    bed.save("x.arrow", &table_file(&[5])).unwrap();
    assert_eq!(column(&bed.load("x.arrow").unwrap()), [5]);
    assert_eq!(bed.list(""), ["empty", "report.csv", "x.arrow"]);
}

#[test]
fn a_path_replaces_what_it_showed_and_nothing_else() {
    let bed = bed();
    bed.save("x.arrow", &table_file(&[1])).unwrap();
    let pickle = b"\x80\x05K\x07.";
    bed.save("x.pkl", pickle).unwrap();
    assert_eq!(bed.list(""), ["x.arrow", "x.pkl"]);
    assert_eq!(bed.load("x.pkl").unwrap(), pickle);
    assert_eq!(column(&bed.load("x.arrow").unwrap()), [1]);
    bed.save("x.pkl", b"\x80\x05K\x08.").unwrap();
    assert_eq!(bed.load("x.pkl").unwrap(), b"\x80\x05K\x08.");
    bed.fs.unlink(ROOT, OsStr::new("x.arrow"), ME).unwrap();
    assert_eq!(bed.list(""), ["x.pkl"]);
    // Another format of a table is the same dataset.
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    bed.save("t.feather", &table_file(&[2])).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    assert_eq!(bed.list(""), ["t.feather", "x.pkl"]);
}

#[test]
fn truncating_and_writing_nothing_leaves_the_old_version() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    // A plain file is empty then, as on any filesystem.
    bed.save("f.txt", b"text").unwrap();
    let writer = bed.create("f.txt", ME).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("f.txt").unwrap(), b"");
}

#[test]
fn an_unfinished_file_is_kept_as_it_is_if_its_writer_says_so() {
    let bed = bed();
    let file = table_file(&[1]);
    bed.save("t.arrow", &file).unwrap();
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..file.len() / 2]);
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file[..file.len() / 2]);
    // The writer goes on.
    bed.write(writer, 0, &table_file(&[9]));
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [9]);
    // A writer that dies closes without a word: the version before stays.
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..file.len() / 2]);
    bed.fs.release(writer.0, writer.1.fh);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [9]);
}

#[test]
fn a_failed_publish_keeps_both_versions_and_can_be_repeated() {
    for op in [Op::CreateBlobs, Op::SealBlobs, Op::CreateObjects, Op::Persist, Op::PutName] {
        let bed = bed();
        bed.save("t.arrow", &table_file(&[1])).unwrap();
        let (objects, blobs) = (bed.store.object_count(), bed.store.blob_count());
        let writer = bed.create("t.arrow", ME).unwrap();
        bed.write(writer, 0, &table_file(&[2]));
        bed.store.fail_next(op, 1, Kind::Full);
        assert_eq!(bed.fs.flush(writer.0, writer.1.fh, ME).unwrap_err().kind(), Kind::Full, "{op:?}");
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (objects, blobs), "left over after {op:?}");
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [1], "others still read the old value");
        assert_eq!(bed.fs.status()["staging"]["failed"].as_array().unwrap().len(), 1);
        bed.fs.fsync(writer.0, writer.1.fh).unwrap();
        bed.close(writer, ME).unwrap();
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    }
}

#[test]
fn the_same_handle_is_published_again_when_it_changed() {
    let bed = bed();
    let writer = bed.create("log.txt", ME).unwrap();
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    bed.write(writer, 0, b"one\n");
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.load("log.txt").unwrap(), b"one\n");
    let puts = bed.store.calls(Op::PutName);
    std::thread::sleep(Duration::from_millis(30));
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.store.calls(Op::PutName), puts, "nothing changed, nothing is published");
    bed.write(writer, 4, b"two\n");
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("log.txt").unwrap(), b"one\ntwo\n");
}

#[test]
fn rename_moves_names_and_publishes_by_the_new_extension() {
    let bed = bed();
    let rename = |from: &str, to: &str, flags: u32| {
        let (parent, name) = bed.walk(from).unwrap();
        let (new_parent, new_name) = bed.walk(to).unwrap();
        bed.fs.rename(parent, &name, new_parent, &new_name, flags, ME)
    };
    let file = table_file(&[1, 2]);
    bed.save(".t.arrow.AbCdEf", &file).unwrap();
    rename(".t.arrow.AbCdEf", "t.arrow", 0).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file);
    assert_eq!(column(&bed.load("t.feather").unwrap()), [1, 2], "it became a table");
    assert_eq!(bed.list(""), ["t.arrow"]);
    bed.save("tmp_u.arrow", &table_file(&[3])).unwrap();
    assert_eq!(rename("tmp_u.arrow", "t.arrow", libc::RENAME_NOREPLACE).unwrap_err().kind(), Kind::Exists);
    rename("tmp_u.arrow", "t.arrow", 0).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [3]);
    bed.save("v.tmp", &table_file(&[4])).unwrap();
    rename("v.tmp", "t.arrow", 0).unwrap();
    assert_eq!(bed.list(""), ["t.arrow"]);
    bed.save("v.tmp", &table_file(&[3])).unwrap();
    rename("v.tmp", "t.arrow", 0).unwrap();
    rename("t.arrow", "t.arrow.bak", 0).unwrap();
    assert_eq!(bed.load("t.arrow.bak").unwrap(), table_file(&[3]));
    assert_eq!(bed.list(""), ["t.arrow.bak"]);
    bed.save("a.txt", b"a").unwrap();
    bed.save("b.txt", b"b").unwrap();
    rename("a.txt", "b.txt", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((bed.load("a.txt").unwrap(), bed.load("b.txt").unwrap()), (b"b".to_vec(), b"a".to_vec()));
}

#[test]
fn a_rename_that_cannot_publish_moves_nothing() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    bed.save("new.tmp", &table_file(&[2])).unwrap();
    bed.store.fail_next(Op::CreateBlobs, 1, Kind::Full);
    let (from, to) = (OsStr::new("new.tmp"), OsStr::new("t.arrow"));
    assert_eq!(bed.fs.rename(ROOT, from, ROOT, to, 0, ME).unwrap_err().kind(), Kind::Full);
    assert_eq!(bed.list(""), ["new.tmp", "t.arrow"]);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    assert_eq!(bed.load("new.tmp").unwrap(), table_file(&[2]));
    bed.fs.rename(ROOT, from, ROOT, to, 0, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    assert_eq!(bed.list(""), ["t.arrow"]);
}

#[test]
fn directories_come_and_go() {
    let bed = bed();
    let mkdir = |path: &str| {
        let (parent, name) = bed.walk(path).unwrap();
        bed.fs.mkdir(parent, &name, 0o755, 0, ME)
    };
    let rmdir = |path: &str| {
        let (parent, name) = bed.walk(path).unwrap();
        bed.fs.rmdir(parent, &name, ME)
    };
    mkdir("a").unwrap();
    assert_eq!(mkdir("a").unwrap_err().kind(), Kind::Exists);
    mkdir("a/X.arrow").unwrap();
    bed.save("a/X.arrow/v1", b"1").unwrap();
    assert_eq!(bed.list("a"), ["X.arrow"]);
    assert_eq!(rmdir("a").unwrap_err().kind(), Kind::NotEmpty);
    let (parent, name) = bed.walk("a/X.arrow/v1").unwrap();
    bed.fs.unlink(parent, &name, ME).unwrap();
    assert_eq!(bed.list("a/X.arrow"), Vec::<String>::new(), "the directory stays when its last file goes");
    rmdir("a/X.arrow").unwrap();
    rmdir("a").unwrap();
    assert_eq!(bed.list(""), Vec::<String>::new());
    // Moving a directory moves every name below it.
    mkdir("d").unwrap();
    bed.save("d/t.arrow", &table_file(&[4])).unwrap();
    bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
    assert_eq!(column(&bed.load("e/t.arrow").unwrap()), [4]);
    assert_eq!(bed.list(""), ["e"]);
}

#[test]
fn unlinked_files_stay_readable_and_leave_nothing() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        bed.put_tensor("x", &vec![2.5; 100_000]);
        let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
        bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME).unwrap();
        assert_eq!(bed.load("x.npy").unwrap_err().kind(), Kind::NotFound);
        // Someone else takes the memory if it is free.
        bed.put_tensor("y", &vec![-1.0; 100_000]);
        let bytes = bed.read_handle(reader).unwrap();
        assert_eq!(bytes[bytes.len() - 8..], 2.5f64.to_le_bytes());
        bed.close(reader, OTHER).unwrap();
        bed.fs.unlink(ROOT, OsStr::new("y.npy"), ME).unwrap();
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
    }
}

#[test]
fn a_listing_keeps_no_memory_of_removed_files() {
    let bed = bed_with(false, Options::default());
    let handle = bed.create("a.bin", ME).unwrap();
    bed.write(handle, 0, &[1; 1000]);
    bed.close(handle, ME).unwrap();
    assert_eq!(bed.list(""), ["a.bin"]);
    bed.fs.unlink(ROOT, OsStr::new("a.bin"), ME).unwrap();
    // The kernel takes all lookups back.
    bed.fs.forget(handle.0, u64::MAX);
    assert!(bed.host.files.lock().unwrap().is_empty(), "its memory is free");
}

/// Entries of a directory from a cookie on, at most so many: names, whether they came with attributes, and the next cookie.
fn entries(bed: &Bed, fh: u64, offset: u64, most: usize) -> (Vec<(String, bool)>, u64) {
    let (mut found, mut next) = (Vec::new(), offset);
    let mut add = |entry: DirEntry| {
        if found.len() == most {
            return true;
        }
        if let Some(attributes) = &entry.entry {
            bed.fs.forget(attributes.attr.ino, 1);
        }
        next = entry.next;
        found.push((entry.name.to_str().unwrap().to_owned(), entry.entry.is_some()));
        false
    };
    bed.fs.readdir(ROOT, fh, offset, true, &mut add).unwrap();
    found.retain(|(name, _)| !name.starts_with('.'));
    (found, next)
}

#[test]
fn who_lists_while_names_change_gets_all_that_stayed_and_no_attributes_of_what_went() {
    let bed = bed();
    let name = |i: usize| format!("x{i}.npy");
    (0..200).for_each(|i| {
        bed.put_tensor(&format!("x{i}"), &[1.0]);
    });
    let fh = bed.fs.opendir(ROOT).unwrap();
    let (first, next) = entries(&bed, fh, 0, 60);
    assert!(first.iter().all(|(_, attributes)| *attributes));
    let seen: HashSet<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    // Half of those that come later go, and others come.
    let gone: Vec<String> = (0..200).map(name).filter(|name| !seen.contains(name.as_str())).step_by(2).collect();
    gone.iter().for_each(|name| bed.fs.unlink(ROOT, OsStr::new(name), ME).unwrap());
    (0..100).for_each(|i| {
        bed.put_tensor(&format!("y{i}"), &[1.0]);
    });
    let (rest, _) = entries(&bed, fh, next, 1000);
    assert!(rest.iter().all(|(_, attributes)| !attributes), "they are of the former listing");
    assert_eq!(rest.len() + first.len(), 200);
    // The same from a server that does not know the handle.
    let (rest, _) = entries(&bed, fh + 1000, next, 1000);
    assert!(rest.iter().all(|(_, attributes)| *attributes));
    let rest: HashSet<String> = rest.into_iter().map(|(name, _)| name).collect();
    for name in (0..200).map(name).filter(|name| !seen.contains(name.as_str())) {
        assert_eq!(rest.contains(&name), !gone.contains(&name), "{name}");
    }
    bed.fs.releasedir(ROOT, fh);
}

#[test]
fn recycled_memory_is_never_served() {
    let bed = bed_with(false, Options::default());
    let id = bed.put_tensor("x", &vec![1.0; 100_000]);
    let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    bed.fs.read(reader.0, reader.1.fh, 0, 4096).unwrap();
    // Another client deletes it; the store gives its memory to the next.
    bed.store.delete(&[id]).unwrap();
    bed.put_tensor("z", &vec![9.0; 100_000]);
    assert_eq!(bed.fs.read(reader.0, reader.1.fh, 4096, 4096).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn an_open_gets_the_newest_object() {
    let bed = bed();
    bed.put_tensor("x", &[1.0]);
    let stale = bed.lookup("x.npy", ME).unwrap();
    bed.put_tensor("x", &[2.0]);
    assert_eq!(bed.fs.open(stale.attr.ino, libc::O_RDONLY, ME).unwrap_err().kind(), Kind::Stale);
    let bytes = bed.load("x.npy").unwrap();
    assert_eq!(bytes[bytes.len() - 8..], 2.0f64.to_le_bytes());
}

#[test]
fn attributes_are_kept_with_the_dataset() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let entry = bed.lookup("t.arrow", ME).unwrap();
    assert_eq!((entry.attr.perm, entry.attr.uid, entry.attr.gid), (0o644, 7, 8));
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_891);
    let change = SetAttr { mode: Some(0o600), mtime: Some(time), ..Default::default() };
    bed.fs.setattr(entry.attr.ino, None, change, ME).unwrap();
    bed.fs.setxattr(entry.attr.ino, OsStr::new("user.note"), b"hi", 0, ME).unwrap();
    let second = FileSystem::new(bed.store.clone(), bed.host.clone(), Options::default());
    let entry = second.lookup(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!((entry.attr.perm, entry.attr.mtime), (0o600, time));
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.note")).unwrap(), b"hi");
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.vineyard.name")).unwrap(), b"t");
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.vineyard.rows")).unwrap(), b"1");
    let handle = second.open(entry.attr.ino, libc::O_RDONLY, ME).unwrap();
    second.release(entry.attr.ino, handle.fh);
    // Only one object is there: the changes left no copies behind.
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let bed = bed_with(true, Options { read_only: true, ..Default::default() });
    bed.put_tensor("x", &[1.0]);
    let error = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), Kind::ReadOnly);
    let ino = bed.lookup("x.npy", ME).unwrap().attr.ino;
    error(bed.fs.open(ino, libc::O_WRONLY, ME).map(drop));
    error(bed.fs.create(ROOT, OsStr::new("y"), 0o644, 0, libc::O_WRONLY, ME).map(drop));
    error(bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME));
    error(bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).map(drop));
    error(bed.fs.rename(ROOT, OsStr::new("x.npy"), ROOT, OsStr::new("y.npy"), 0, ME));
    error(bed.fs.setattr(ino, None, SetAttr { mode: Some(0), ..Default::default() }, ME).map(drop));
    error(bed.fs.setxattr(ino, OsStr::new("user.a"), b"", 0, ME));
}

#[test]
fn a_prefix_is_a_root_of_its_own() {
    let bed = bed_with(true, Options { prefix: "runs/one".into(), ..Default::default() });
    bed.put_tensor("runs/one/x", &[1.0]);
    bed.put_tensor("runs/two/y", &[1.0]);
    bed.put_tensor("z", &[1.0]);
    assert_eq!(bed.list(""), ["x.npy"]);
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let names = bed.store.names(&[crate::vineyard::store::NameQuery::Exact("runs/one/t".into())]).unwrap();
    assert_eq!(names[0].len(), 1);
    assert_eq!(bed.load("z.npy").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn odd_names_are_all_listed_and_open() {
    let bed = bed();
    let long = "n".repeat(400);
    let names = [
        ".",
        "..",
        "a//b",
        "nul\0here",
        "new\nline",
        "100%",
        "%00",
        "ünï",
        "*?[x]",
        &long,
        "x",
        "x.npy",
        "/",
        "//",
        "/x",
    ];
    for (i, name) in names.iter().enumerate() {
        bed.put_tensor(name, &[i as f64]);
    }
    let mut found = 0;
    let mut pending = vec![String::new()];
    while let Some(directory) = pending.pop() {
        for name in bed.list(&directory) {
            let path = if directory.is_empty() { name } else { format!("{directory}/{name}") };
            let entry = bed.lookup(&path, ME).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            match entry.attr.kind {
                FileKind::Directory => pending.push(path),
                _ => {
                    let bytes = bed.load(&path).unwrap();
                    // "x" gives way to the plain "x.npy": it is listed by another of its views.
                    assert!(bytes.starts_with(b"\x93NUMPY") || path == "x.arrow", "{path:?}");
                    found += 1;
                }
            }
        }
    }
    assert_eq!(found, names.len());
}

#[test]
fn broken_objects_are_listed_and_the_rest_works() {
    let bed = bed();
    bed.put_tensor("good", &[1.0]);
    for (name, shape) in [("negative", "[-4]"), ("huge", "[9007199254740992, 4096]"), ("text", "nonsense")] {
        let blob = bed.store.put_blob(&[0; 8]).unwrap();
        let buffer = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
        let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64",
            "value_type_meta_": "<f8", "shape_": shape, "order_": "\"C\"", "buffer_": buffer});
        bed.store.put_object(name, content).unwrap();
    }
    // A shape that promises more than the blob holds shows only when it is opened.
    let blob = bed.store.put_blob(&[0; 8]).unwrap();
    let buffer = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
    let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64", "value_type_meta_": "<f8",
        "shape_": "[1000]", "order_": "\"C\"", "buffer_": buffer});
    bed.store.put_object("short", content).unwrap();
    bed.store.put_object("alien", json!({"typename": "graphscope::Thing"})).unwrap();
    assert_eq!(bed.list(""), ["alien", "good.npy", "huge", "negative", "short.npy", "text"]);
    for path in ["alien", "huge", "negative", "text", "short.npy"] {
        assert_eq!(bed.load(path).unwrap_err().errno(), libc::EIO, "{path}");
    }
    bed.load("good.npy").unwrap();
}

#[test]
fn the_cache_keeps_to_its_limit() {
    let bed = bed_with(true, Options { cache_size: 3 << 20, ..Default::default() });
    for i in 0..8 {
        bed.put_tensor(&format!("x{i}"), &vec![f64::from(i); 131_072]);
    }
    for i in 0..8 {
        let bytes = bed.load(&format!("x{i}.npy")).unwrap();
        assert_eq!(bytes[bytes.len() - 8..], f64::from(i).to_le_bytes());
        assert!(bed.fs.status()["cache"]["bytes"].as_u64().unwrap() <= 3 << 20);
    }
    assert_eq!(bed.host.images(), 2);
}

#[test]
fn a_new_server_knows_the_inodes_of_the_former_one() {
    let bed = bed();
    bed.put_tensor("d/x", &[1.0]);
    let directory = bed.lookup("d", ME).unwrap().attr.ino;
    let file = bed.lookup("d/x.npy", ME).unwrap().attr.ino;
    let next = FileSystem::new(bed.store.clone(), bed.host.clone(), Options::default());
    assert_eq!(next.getattr(file, None).unwrap().0.ino, file);
    assert_eq!(next.lookup(directory, OsStr::new("x.npy"), ME).unwrap().attr.ino, file);
    let bytes = next.read(file, 12345, 0, 4096).unwrap();
    assert_eq!(bytes[bytes.len() - 8..], 1.0f64.to_le_bytes());
    assert_eq!(next.getattr(99, None).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn a_new_server_goes_on_with_images_and_half_written_files() {
    let bed = bed();
    bed.put_tensor("x", &vec![1.0; 100_000]);
    bed.save("done.arrow", &table_file(&[1])).unwrap();
    let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    let file = table_file(&[5, 6]);
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..200]);
    // The former server is killed: it drops nothing.
    let Bed { fs, store, host, .. } = bed;
    std::mem::forget(fs);
    let fs = FileSystem::new(store.clone(), host.clone(), Options::default());
    fs.adopt();
    let bed = Bed::of(fs, store, host);
    // An image that is open has to be served under the same id: the kernel refuses another.
    let again = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    assert_eq!((again.0, again.1.serve), (reader.0, reader.1.serve));
    bed.write(writer, 0, &file);
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file);
    assert_eq!(column(&bed.load("done.arrow").unwrap()), [1]);
    // What was published is not dirty to the new server: a value of another client is seen.
    bed.put_tensor("done", &[2.0]);
    assert_eq!(bed.list(""), ["done.npy", "t.arrow", "x.npy"]);
}

#[test]
fn an_object_that_another_name_leads_to_outlives_its_own() {
    use crate::vineyard::fake::FakeStore;
    // With few names in the store all are asked for, with many the object; in a cluster always that.
    for (names, store) in
        [(0, FakeStore::new(1 << 20).alone()), (300, FakeStore::new(1 << 20).alone()), (0, FakeStore::new(1 << 20))]
    {
        let store = Arc::new(store);
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let content = || serde_json::json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        for number in 0..names {
            store.put_object(&format!("n{number}"), content()).unwrap();
        }
        let (first, second) = (store.put_object("a", content()).unwrap(), store.put_object("c", content()).unwrap());
        store.put_name("b", first).unwrap();
        fs.point_name("a", second, &["a"]).unwrap();
        assert_eq!(store.object_count(), names + 2, "b leads to it");
        let third = store.put_object("d", content()).unwrap();
        fs.point_name("b", third, &["b"]).unwrap();
        assert_eq!(store.object_count(), names + 2, "nothing leads to the first object");
        assert!(!store.metas(&[first], true).unwrap().contains_key(&first));
    }
}
