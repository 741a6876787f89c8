//! Which version of a file readers and writers see.

use std::sync::atomic::AtomicU64;

use super::super::*;
use super::bed::*;
use super::*;

#[test]
fn readers_keep_their_version_and_the_old_object_goes() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        bed.save("t.arrow", &table_file(&[1])).unwrap();
        let objects = bed.store.object_count();
        let blobs = bed.store.blob_count();
        let reader = bed.open("t.arrow", libc::O_RDONLY, OTHER).unwrap();
        let writer = bed.create("t.arrow", ME).unwrap();
        assert_ne!(reader.0, writer.0, "a writer gets an inode of its own");
        bed.write(writer, 0, &table_file(&[2])[..100]);
        // Half written: others still read the published version.
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
        bed.write(writer, 0, &table_file(&[2]));
        bed.close(writer, ME).unwrap();
        assert_eq!(column(&bed.read_handle(reader).unwrap()), [1]);
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
        bed.close(reader, OTHER).unwrap();
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (objects, blobs));
    }
}

#[test]
fn two_writers_of_one_name_end_with_one_whole_value() {
    let bed = bed();
    let first = bed.create("t.arrow", ME).unwrap();
    bed.write(first, 0, &table_file(&[1, 1, 1])[..64]);
    let second = bed.create("t.arrow", OTHER).unwrap();
    bed.write(second, 0, &table_file(&[2, 2]));
    bed.write(first, 0, &table_file(&[1, 1, 1]));
    bed.close(second, OTHER).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2, 2]);
    bed.close(first, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1, 1, 1]);
    bed.fs.unlink(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
}

#[test]
fn a_reader_that_was_sent_to_a_version_gets_it_even_if_the_next_is_published_meanwhile() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        bed.save("t.arrow", &table_file(&[1])).unwrap();
        let (objects, blobs) = (bed.store.object_count(), bed.store.blob_count());
        let writer = bed.create("t.arrow", ME).unwrap();
        bed.write(writer, 0, &table_file(&[2])[..100]);
        let staged = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
        assert_eq!(bed.fs.open(staged, libc::O_RDONLY, OTHER).unwrap_err().kind(), Kind::Stale);
        let version = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
        bed.write(writer, 0, &table_file(&[2]));
        bed.close(writer, ME).unwrap();
        let opened = bed.fs.open(version, libc::O_RDONLY, OTHER).unwrap();
        assert_eq!(column(&bed.read_handle((version, opened)).unwrap()), [1]);
        bed.close((version, opened), OTHER).unwrap();
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (objects, blobs));
    }
}

#[test]
fn what_may_be_mapped_writably_is_looked_up_in_the_store_as_soon_as_it_is_closed() {
    let bed = bed();
    let (entry, opened) =
        bed.fs.create(ROOT, OsStr::new("tmp"), 0o600, 0, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, ME).unwrap();
    let writer = (entry.attr.ino, opened);
    bed.write(writer, 0, b"text");
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    bed.fs.rename(ROOT, OsStr::new("tmp"), ROOT, OsStr::new("a.txt"), 0, ME).unwrap();
    // The moment between the decision and its effect.
    bed.fs.staging.at("a.txt").unwrap().state().retired = true;
    assert_ne!(bed.lookup("a.txt", OTHER).unwrap().attr.ino, writer.0);
    assert_eq!(bed.load("a.txt").unwrap(), b"text");
    bed.fs.release(writer.0, writer.1.fh);
    assert_eq!(bed.load("a.txt").unwrap(), b"text");
}

#[test]
fn what_is_published_does_not_change_while_the_file_is_written_in_place() {
    for cut in [false, true] {
        let bed = bed();
        bed.save("a.txt", b"first").unwrap();
        // Nobody has read it yet, so the writer goes on with the very file.
        let writer = bed.open("a.txt", libc::O_RDWR, ME).unwrap();
        if cut {
            bed.fs.setattr(writer.0, Some(writer.1.fh), SetAttr { size: Some(2), ..Default::default() }, ME).unwrap();
        } else {
            bed.write(writer, 0, b"other");
        }
        let reader = bed.open("a.txt", libc::O_RDONLY, OTHER).unwrap();
        assert_eq!(bed.read_handle(reader).unwrap(), b"first", "cut: {cut}");
        bed.close(writer, ME).unwrap();
        assert_eq!(bed.read_handle(reader).unwrap(), b"first");
        bed.close(reader, OTHER).unwrap();
        assert_eq!(bed.load("a.txt").unwrap(), if cut { &b"fi"[..] } else { b"other" });
    }
}

#[test]
fn a_file_that_is_being_replaced_moves_with_its_directory() {
    for unlink in [true, false] {
        let bed = bed();
        bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
        bed.save("d/t.arrow", &table_file(&[1])).unwrap();
        let writer = bed.create("d/t.arrow", ME).unwrap();
        bed.write(writer, 0, &table_file(&[2])[..100]);
        bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
        assert_eq!(column(&bed.load("e/t.arrow").unwrap()), [1]);
        if unlink {
            let (directory, name) = bed.walk("e/t.arrow").unwrap();
            bed.fs.unlink(directory, &name, ME).unwrap();
            assert_eq!((bed.list("e"), bed.store.object_count()), (vec![], 0), "the version before is gone, too");
            bed.close(writer, ME).unwrap();
            assert_eq!(bed.list("e"), Vec::<String>::new());
        } else {
            bed.write(writer, 0, &table_file(&[2]));
            bed.close(writer, ME).unwrap();
            assert_eq!(column(&bed.load("e/t.arrow").unwrap()), [2]);
        }
    }
}

/// An object that was written as a file is that file, whatever else of it cannot be read.
#[test]
fn a_written_file_outlives_its_columns() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let file = table_file(&[3, 1, 2]);
        let blob = bed.store.put_blob(&file).unwrap();
        let kept = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": blob.instance.0});
        let recipe = json!({"view": "arrow", "size": file.len()}).to_string();
        let content = json!({"typename": "vineyard::Table", "vineyard_fs_schema_": "{}", "num_rows_": 3,
            "vineyard_fs_recipe_": recipe, "vineyard_fs_kept_": kept});
        bed.store.put_object("t", content).unwrap();
        assert_eq!(bed.list(""), ["t.arrow"]);
        assert_eq!(bed.load("t.arrow").unwrap(), file);
        assert_eq!(bed.load("t.parquet").unwrap_err().kind(), Kind::NotFound);
        // Its bytes are the last that is left: they are not given up, however little room there is.
        let large = vec![1; 65 << 20];
        assert_eq!(bed.save("large.bin", &large).unwrap_err().kind(), Kind::Full);
        assert_eq!(bed.load("t.arrow").unwrap(), file);
    }
}

/// A compressed file with a column of `values`.
fn compressed(values: Vec<i64>) -> Vec<u8> {
    use arrow_array::{ArrayRef, Int64Array, RecordBatch};
    let batch = RecordBatch::try_from_iter([("a", Arc::new(Int64Array::from(values)) as ArrayRef)]).unwrap();
    let options = arrow_ipc::writer::IpcWriteOptions::default();
    let options = options.try_with_compression(Some(arrow_ipc::CompressionType::LZ4_FRAME)).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new_with_options(Vec::new(), &batch.schema(), options).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// Kept files give way before a compressed one loses its columns, and it loses them before its save fails.
#[test]
fn compressed_files_in_a_store_that_fills() {
    let store = Arc::new(crate::vineyard::fake::FakeStore::new(8 << 20));
    let host = Arc::new(LocalHost { passthrough: true, next: AtomicU64::new(1), ..LocalHost::default() });
    let fs = FileSystem::new(store.clone(), host.clone(), Options::default());
    let bed = Bed::of(fs, store, host);
    // 1.5 MiB that do not get smaller.
    let mut random = 1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as i64
    };
    let files: Vec<Vec<i64>> = (0..4).map(|_| (0..196_608).map(|_| next()).collect()).collect();
    for (name, values) in ["a", "b", "c", "d"].iter().zip(&files) {
        bed.save(&format!("{name}.feather"), &compressed(values.clone())).unwrap();
        assert_eq!(&column(&bed.load(&format!("{name}.arrow")).unwrap()), values, "{name}");
    }
    for (name, values) in ["a", "b", "c", "d"].iter().zip(&files) {
        assert_eq!(&column(&bed.load(&format!("{name}.feather")).unwrap()), values, "{name}");
    }
    // There is no room for 4 MiB, but for what they are compressed.
    let file = compressed(vec![7; 4 << 17]);
    bed.save("e.feather", &file).unwrap();
    assert_eq!(bed.load("e.feather").unwrap(), file);
    assert_eq!(bed.load("e.arrow").unwrap_err().kind(), Kind::NotFound);
    // More than the store has is plain at once.
    let file = compressed(vec![7; 9 << 17]);
    bed.save("f.feather", &file).unwrap();
    assert_eq!(bed.load("f.feather").unwrap(), file);
    assert_eq!(bed.list(""), ["a.feather", "b.feather", "c.feather", "d.feather", "e.feather", "f.feather"]);
}
