//! Views that are open, or being opened, while their attributes change.

use super::super::*;
use super::bed::*;
use super::*;

fn values() -> Vec<f64> {
    (0..20_000).map(f64::from).collect()
}

fn chmod(bed: &Bed, ino: u64, mode: u32) -> Result<()> {
    bed.fs.setattr(ino, None, SetAttr { mode: Some(mode), ..Default::default() }, ME).map(drop)
}

#[test]
fn changed_attributes_of_one_name_leave_the_object_to_another() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let object = bed.put_tensor("n1", &values());
        bed.store.put_name("n2", object).unwrap();
        let bytes = bed.load("n1.npy").unwrap();
        chmod(&bed, bed.lookup("n1.npy", ME).unwrap().attr.ino, 0o600).unwrap();
        assert_eq!(bed.lookup("n1.npy", ME).unwrap().attr.perm, 0o600);
        for name in ["n1.npy", "n2.npy"] {
            assert_eq!(bed.load(name).unwrap(), bytes, "{name}");
            bed.fs.unlink(ROOT, OsStr::new(name), ME).unwrap();
        }
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
    }
}
