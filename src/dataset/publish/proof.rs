//! The proof that what was stored can be read again, before what it replaces goes.

use std::collections::HashMap;

use crate::dataset;
use crate::error::{Error, Result};
use crate::vineyard::{Blob, BlobKey, BlobSource, ObjectId, Store};

/// Decodes a new object, as whoever lists or opens it will. `sizes` are those of its blobs.
///
/// # Errors
/// `Malformed` if that is not possible: the file is to be stored in another form. What the store answers.
pub(super) fn prove(store: &dyn Store, object: ObjectId, sizes: HashMap<ObjectId, u64>) -> Result<()> {
    let meta = store.metas(&[object], false)?.remove(&object);
    let meta = meta.ok_or_else(|| Error::stale(format!("object {object} is gone as soon as it was made")))?;
    match meta.and_then(|meta| dataset::decode(&meta, &Sized { store, sizes })) {
        Err(error) if error.is_of_content() => {
            Err(Error::malformed("its object could not be read again").with_source(error))
        }
        other => other.map(drop),
    }
}

/// A store of which some blobs' sizes are known.
struct Sized<'a> {
    store: &'a dyn Store,
    sizes: HashMap<ObjectId, u64>,
}

impl BlobSource for Sized<'_> {
    fn size(&self, key: BlobKey) -> Result<u64> {
        self.sizes.get(&key.id).map_or_else(|| self.store.size(key), |size| Ok(*size))
    }
    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        self.store.read(key, offset, out)
    }
    fn prepare(&self, keys: &[BlobKey]) -> Result<()> {
        self.store.prepare(keys)
    }
    fn verify(&self, keys: &[BlobKey]) -> Result<()> {
        self.store.verify(keys)
    }
    fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        self.store.blob(key)
    }
}
