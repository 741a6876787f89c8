//! Data that has moved, was lost, or cannot be asked for.

use serde_json::Map;

use super::super::copies::Copy;
use super::super::*;
use super::bed::*;
use super::model::next_server;
use super::*;
use crate::vineyard::copy::copy_object;
use crate::vineyard::{InstanceId, Meta};

fn values() -> Vec<f64> {
    (0..100_000).map(f64::from).collect()
}

fn copy(bed: &Bed, object: ObjectId) -> ObjectId {
    let meta: Meta = bed.store.metas(&[object], true).unwrap().remove(&object).unwrap().unwrap();
    copy_object(&*bed.store, &meta, Map::new(), &mut |_| Ok(())).unwrap()
}

/// An array of Python objects: how long its file is only its blob tells.
fn put_pickled(bed: &Bed, name: &str) {
    let blob = bed.store.put_blob(b"\x80\x05K\x07.").unwrap();
    let blob = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob"});
    let content = json!({"typename": "vineyard::Tensor<object>", "value_type_": "object", "value_type_meta_": "|O",
        "shape_": "[1, 1]", "buffer_": blob});
    bed.store.put_object(name, content).unwrap();
}

#[test]
fn an_open_file_goes_on_where_its_dataset_has_moved_or_with_a_copy() {
    for moved in [true, false] {
        let bed = bed_with(false, Options::default());
        let object = bed.put_tensor("x", &values());
        let bytes = bed.load("x.npy").unwrap();
        let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
        bed.fs.read(reader.0, reader.1.fh, 0, 4096).unwrap();
        let other = copy(&bed, object);
        if moved {
            bed.store.put_name("x", other).unwrap();
        } else {
            let copy = Copy { source: object, instance: InstanceId(0), object: other };
            bed.store.put_name(&copy.name(), other).unwrap();
        }
        bed.store.delete(&[object]).unwrap();
        bed.put_tensor("z", &vec![9.0; 100_000]);
        assert_eq!(bed.read_handle(reader).unwrap(), bytes, "moved: {moved}");
        bed.close(reader, OTHER).unwrap();
    }
}

#[test]
fn an_open_file_stays_readable_where_its_dataset_has_moved() {
    type Change = (&'static str, fn(&Bed), usize);
    let changes: [Change; 2] = [
        ("saved", |bed| bed.save("x.npy", b"other").unwrap(), 1),
        ("removed", |bed| bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME).unwrap(), 0),
    ];
    for (what, change, left) in changes {
        for restarted in [false, true] {
            let mut bed = bed_with(false, Options::default());
            let object = bed.put_tensor("x", &values());
            let bytes = bed.load("x.npy").unwrap();
            let [first, second] = [(); 2].map(|()| bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap());
            let moved = copy(&bed, object);
            bed.store.put_name("x", moved).unwrap();
            bed.store.delete(&[object]).unwrap();
            bed.fs.read(first.0, first.1.fh, 0, 4096).unwrap();
            assert_eq!(*bed.fs.lazy_opens(), HashMap::from([(moved, 2)]));
            if restarted {
                bed = next_server(bed, 1);
                assert_eq!(*bed.fs.lazy_opens(), HashMap::from([(moved, 2)]));
            }
            change(&bed);
            // Other data takes the memory of what is deleted.
            bed.put_tensor("z", &vec![9.0; 100_000]);
            for reader in [first, second] {
                assert_eq!(bed.read_handle(reader).unwrap(), bytes, "{what}, restarted: {restarted}");
                bed.close(reader, OTHER).unwrap();
            }
            assert!(bed.fs.lazy_opens().is_empty(), "{what}, restarted: {restarted}");
            assert_eq!(bed.store.object_count(), left + 1, "{what}, restarted: {restarted}");
        }
    }
}

#[test]
fn an_open_file_goes_on_with_no_other_value_of_its_name() {
    let bed = bed_with(false, Options::default());
    let object = bed.put_tensor("x", &values());
    let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    bed.fs.read(reader.0, reader.1.fh, 0, 4096).unwrap();
    bed.put_tensor("x", &vec![9.0; 100_000]);
    bed.store.delete(&[object]).unwrap();
    assert_eq!(bed.fs.read(reader.0, reader.1.fh, 4096, 4096).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn an_object_that_cannot_be_asked_for_keeps_no_other_from_being_listed() {
    for kind in [Kind::Unreachable, Kind::Stale, Kind::Malformed] {
        let bed = bed();
        let names = ["a", "b", "c"];
        names.iter().for_each(|name| put_pickled(&bed, name));
        // All together, and then one by one; and when file names are made, again, until after the first.
        bed.store.fail_next(Op::Prepare, 6, kind);
        let listed = bed.fs.datasets("").unwrap();
        assert_eq!(listed.len(), 3, "{kind:?}");
        let away: Vec<_> = listed.iter().filter(|named| named.summary.is_none()).collect();
        assert_eq!(away.len(), 1, "{kind:?}");
        bed.store.fail_next(Op::Prepare, 2, kind);
        assert_eq!(bed.lookup(&format!("{}.pkl", away[0].name), ME).unwrap_err().kind(), Kind::Unreachable);
        // Another time it may be had.
        assert_eq!(bed.list(""), ["a.pkl", "b.pkl", "c.pkl"]);
    }
    let bed = bed();
    put_pickled(&bed, "a");
    bed.store.fail_next(Op::Prepare, 2, Kind::Timeout);
    assert_eq!(bed.fs.datasets("").unwrap_err().kind(), Kind::Timeout, "the store itself");
}

#[test]
fn a_dataset_whose_object_was_lost_is_read_from_its_copy() {
    let bed = bed();
    let object = bed.put_tensor("x", &values());
    let bytes = bed.load("x.npy").unwrap();
    let named = bed.fs.require("x").unwrap();
    let other = copy(&bed, object);
    bed.store.put_name(&Copy { source: object, instance: InstanceId(0), object: other }.name(), other).unwrap();
    bed.store.delete(&[object]).unwrap();
    // As a command that begins now knows it.
    let fs = FileSystem::unmounted(bed.store.clone());
    let image = fs.view_image(&fs.require("x").unwrap(), named.view).unwrap();
    let mut read = vec![0; image.size() as usize];
    image.read(&*bed.store, 0, &mut read).unwrap();
    assert_eq!(read, bytes);
    assert_eq!(fs.living(object).unwrap().iter().map(Meta::id).collect::<Vec<_>>(), [other]);
    assert_eq!(fs.copy_here(object, &mut |_| Ok(())).unwrap().object(), other);
    fs.move_here(&fs.require("x").unwrap(), &mut |_| Ok(())).unwrap();
    assert_eq!(fs.object_of("x").unwrap(), Some(other));
    assert_eq!(bed.store.object_count(), 1);
    let error = fs.living(object).unwrap_err();
    assert!(error.kind() == Kind::Stale && error.to_string().contains("vineyard-fs gc"), "{error}");
}
