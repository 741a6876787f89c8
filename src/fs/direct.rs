//! Datasets without a mount: what commands do with the names of a store.
//!
//! A filesystem that nobody mounted knows the same paths, views and rules of replacing as a mounted one.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::gc::Life;
use super::host::{Area, Host, HostFile, Serving};
use super::inode::ViewNode;
use super::objects::Summary;
use super::publish::{MappedFile, Unfinished, format_of, verdict};
use super::resolve::{Found, Target, Vacancy, suffix};
use super::{FileSystem, Options, name};
use crate::dataset::FileAttributes;
use crate::dataset::publish::Staged as StagedBytes;
use crate::dataset::recipe::Written;
use crate::error::{Context, Error, Kind, Result};
use crate::image::{Image, View};
use crate::vineyard::store::NameQuery;
use crate::vineyard::{InstanceId, ObjectId, Store};

/// Names whose likeness to a wrong one is below this (Jaro-Winkler, 0 to 1) are not proposed.
const ALIKE: f64 = 0.85;
/// Beginning of the types of objects that have parts on several instances.
const GLOBAL: &str = "vineyard::Global";
/// Most names that are proposed.
const PROPOSALS: usize = 3;

/// A name of the store and what it leads to.
#[derive(Clone, Debug)]
pub struct Named {
    /// The name.
    pub name: String,
    /// Path of its listed file below the root of a mount.
    pub path: String,
    /// The object that the name points to.
    pub object: ObjectId,
    /// The view that was asked for; the listed one where none was.
    pub view: View,
    /// What is known of the object; `None` if it is not to be had.
    pub summary: Option<Arc<Summary>>,
    /// Why that is so: the name has outlived its object, or its instance does not answer.
    pub life: Option<Life>,
}

impl Named {
    /// The object's summary.
    ///
    /// # Errors
    /// `NotFound` if the name has outlived its object, `Malformed` if the object cannot be shown.
    pub fn shown(&self) -> Result<&Arc<Summary>> {
        let Some(summary) = &self.summary else {
            return Err(match self.life {
                Some(Life::Lives(instance)) => {
                    let what = format!("{:?} is on instance {instance}, which does not answer", self.name);
                    Error::new(Kind::Unreachable, what)
                }
                _ => Error::not_found(format!("{:?} is dangling: its object {} is gone", self.name, self.object)),
            });
        };
        match &summary.broken {
            Some(reason) => Err(Error::malformed(format!("{:?} cannot be shown: {reason}", self.name))),
            None => Ok(summary),
        }
    }

    /// The file name of a view.
    pub fn file_name(&self, view: View) -> String {
        let (_, part) = name::split(&self.name);
        let own = part.rsplit_once('.').and_then(|(_, extension)| View::from_extension(extension));
        let suffix = if own == Some(view) { String::new() } else { suffix(view) };
        name::encode_file(part, &suffix, &self.name)
    }
}

/// The host of a filesystem without a mount: memory files of this process.
#[derive(Debug, Default)]
pub(super) struct Unmounted {
    next: AtomicU64,
}

impl Host for Unmounted {
    fn serving(&self) -> Serving {
        Serving::Requests("there is no mount".into())
    }

    fn create_file(&self, _area: Area, size: u64) -> Result<HostFile> {
        let file = memory_file()?;
        file.set_len(size)?;
        Ok(HostFile { key: self.next.fetch_add(1, Ordering::Relaxed), file: Arc::new(file), backing: None })
    }

    fn release_file(&self, _key: u64) {}

    fn invalidate_entry(&self, _parent: u64, _name: &OsStr) {}

    fn invalidate_inode(&self, _ino: u64) {}
}

/// An empty memory file of this process.
///
/// # Errors
/// The errno of making it.
pub fn memory_file() -> Result<File> {
    let file = memfd_create("vineyard-fs", MFdFlags::MFD_CLOEXEC).context(|| "making a memory file".into())?;
    Ok(File::from(file))
}

/// Cuts a path below the root into directory and file.
fn target(path: &str) -> Target {
    let (directory, component) = path.rsplit_once('/').unwrap_or(("", path));
    let mut decoded = String::new();
    for part in directory.split('/').filter(|_| !directory.is_empty()) {
        decoded = name::join(&decoded, &name::decode_folder(&decoded, part));
    }
    Target::new(&decoded, component)
}

/// The path of a directory.
fn directory_path(directory: &str) -> String {
    let ends = directory.match_indices('/').map(|(at, _)| at).chain([directory.len()]);
    let mut start = 0;
    let mut path = String::new();
    for end in ends.filter(|_| !directory.is_empty()) {
        path = name::join(&path, &name::encode_folder(&directory[start..end], &directory[..end]));
        start = end + 1;
    }
    path
}

impl FileSystem {
    /// A filesystem for commands.
    pub fn unmounted(store: Arc<dyn Store>) -> Self {
        Self::new(store, Arc::new(Unmounted::default()), Options::default())
    }

    /// All names that begin with `prefix`, in byte order, those that lead nowhere included.
    ///
    /// # Errors
    /// What the store answers.
    pub fn datasets(&self, prefix: &str) -> Result<Vec<Named>> {
        let names = self.names_below(prefix)?;
        let ids: Vec<ObjectId> = names.iter().map(|(_, id)| *id).collect();
        let missing: HashSet<ObjectId> = self.objects.summarize(&*self.store, &ids, None)?.into_iter().collect();
        let mut directories: HashMap<String, (String, HashMap<String, String>)> = HashMap::new();
        let mut out = Vec::with_capacity(names.len());
        for (name, object) in names {
            let (directory, part) = name::split(&name);
            if !directories.contains_key(directory) {
                let listed = (directory_path(directory), self.components(directory)?);
                directories.insert(directory.to_owned(), listed);
            }
            let listed = directories.get(directory);
            let component = listed.and_then(|(_, components)| components.get(&name)).cloned();
            let component = component.unwrap_or_else(|| name::encode_file(part, "", &name));
            let path = name::join(listed.map_or("", |(path, _)| path), &component);
            let summary = self.objects.known_summary(object).filter(|_| !missing.contains(&object));
            let view = summary.as_ref().map_or(View::Raw, |summary| summary.listed);
            out.push(Named { name, path, object, view, summary, life: None });
        }
        self.drop_dead(&mut out)?;
        let lost: Vec<ObjectId> = out.iter().filter(|n| n.summary.is_none()).map(|named| named.object).collect();
        let lives = self.lives(&lost)?;
        out.iter_mut().filter(|named| named.summary.is_none()).for_each(|n| n.life = lives.get(&n.object).copied());
        Ok(out)
    }

    /// Metadata outlives the instance that holds the data: takes the summaries of objects whose instance is gone, unless
    /// a copy goes on. Parts of global objects may live elsewhere.
    fn drop_dead(&self, datasets: &mut [Named]) -> Result<()> {
        let here = self.store.instance()?.id;
        let instance = |named: &Named| {
            let summary = named.summary.as_ref().filter(|summary| !summary.typename.starts_with(GLOBAL))?;
            Some(summary.instance).filter(|instance| *instance != here && *instance != InstanceId::UNSPECIFIED)
        };
        if !datasets.iter().any(|named| instance(named).is_some()) {
            return Ok(());
        }
        let cluster = self.store.cluster()?;
        let is_dead = |named: &Named| instance(named).is_some_and(|instance| !cluster.contains_key(&instance));
        let dead: Vec<ObjectId> = datasets.iter().filter(|named| is_dead(named)).map(|named| named.object).collect();
        let copied = self.objects.copied(&*self.store, &dead)?;
        let lost = datasets.iter_mut().filter(|named| is_dead(named) && !copied.contains(&named.object));
        lost.for_each(|named| named.summary = None);
        Ok(())
    }

    /// What a name, or a path below the root of a mount, leads to.
    ///
    /// # Errors
    /// `IsDirectory`; what the store answers.
    pub fn find(&self, text: &str) -> Result<Option<Named>> {
        let target = target(text);
        let at_path = match target.component.len() {
            1..=name::NAME_MAX => match self.resolve(&target, 0) {
                // The names tell what there is.
                Err(error) if error.kind() == Kind::Unreachable => None,
                other => other?,
            },
            _ => None,
        };
        if let Some(Found::View(view)) = at_path {
            return Ok(Some(self.named(view.name, view.object, Some(view.view), Some(view.summary))));
        }
        for exact in [text, target.dataset()] {
            if let Some(object) = self.object_of(exact)? {
                let summary = match self.objects.summary(&*self.store, object) {
                    Err(error) if error.kind() == Kind::Unreachable => None,
                    other => other?,
                };
                let named = self.named(exact.to_owned(), object, None, summary);
                let asked = target.view.as_ref().map(|(_, view)| *view).filter(|_| exact != text);
                if let (Some(view), Ok(summary)) = (asked, named.shown()) {
                    return Err(no_view(exact, view, summary));
                }
                return Ok(Some(named));
            }
        }
        match at_path {
            Some(Found::Directory { name }) => Err(Error::new(
                Kind::IsDirectory,
                format!("{name:?} is a directory: `vineyard-fs ls {name}/` lists it"),
            )),
            _ => Ok(None),
        }
    }

    fn named(&self, name: String, object: ObjectId, view: Option<View>, summary: Option<Arc<Summary>>) -> Named {
        let (directory, part) = name::split(&name);
        let path = name::join(&directory_path(directory), &Self::listed_component(part, &name, summary.as_deref()));
        let listed = summary.as_ref().map_or(View::Raw, |summary| summary.listed);
        let life = summary.is_none().then(|| self.lives(&[object]).ok()?.remove(&object)).flatten();
        Named { path, object, view: view.unwrap_or(listed), summary, name, life }
    }

    /// As [`FileSystem::find`], where nothing there is an error that proposes names that are alike.
    ///
    /// # Errors
    /// `NotFound`; as [`FileSystem::find`].
    pub fn require(&self, text: &str) -> Result<Named> {
        if let Some(named) = self.find(text)? {
            return Ok(named);
        }
        let alike = self.alike(text)?;
        let hint = if alike.is_empty() { String::new() } else { format!("; there is {}", alike.join(", ")) };
        Err(Error::not_found(format!("no dataset {text:?} in the store{hint}")))
    }

    /// Names that are like a wrong one, the most alike first.
    fn alike(&self, text: &str) -> Result<Vec<String>> {
        let wanted = target(text).dataset().to_lowercase();
        let likeness = |name: &str| {
            let name = name.to_lowercase();
            let (_, part) = name::split(&name);
            let whole = strsim::jaro_winkler(&wanted, &name).max(strsim::jaro_winkler(&wanted, part));
            if name.contains(&wanted) { whole.max(ALIKE) } else { whole }
        };
        let names = self.names_below("")?.into_iter();
        let mut alike: Vec<(f64, String)> =
            names.map(|(name, _)| (likeness(&name), name)).filter(|(likeness, _)| *likeness >= ALIKE).collect();
        alike.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        Ok(alike.into_iter().take(PROPOSALS).map(|(_, name)| format!("{name:?}")).collect())
    }

    /// The bytes of a view.
    ///
    /// # Errors
    /// `NotFound` if the dataset has no such view, `Stale` if the object is gone, `Malformed` if it cannot be shown.
    pub fn view_image(&self, named: &Named, view: View) -> Result<Arc<Image>> {
        let summary = named.shown()?;
        if summary.view(view).is_none() {
            return Err(no_view(&named.name, view, summary));
        }
        Ok(self.nearest(named.object, view, None)?.1)
    }

    /// The living dataset that a file written at a path would replace.
    ///
    /// # Errors
    /// What the store answers.
    pub fn replaced_by(&self, path: &str) -> Result<Option<String>> {
        let target = target(path);
        self.taken(&[target.dataset(), &target.plain])
    }

    fn taken(&self, names: &[&str]) -> Result<Option<String>> {
        let queries: Vec<NameQuery> = names.iter().map(|name| NameQuery::Exact((*name).to_owned())).collect();
        for (name, object) in self.store.names(&queries)?.into_iter().flatten() {
            if self.objects.summary(&*self.store, object)?.is_some() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Makes a dataset of a file, as closing the file at that path of a mount would. Of `attributes`, those that a
    /// former version has are kept. Without `replace` nothing is replaced.
    ///
    /// The file must be of this process alone: its bytes must not change meanwhile.
    ///
    /// # Errors
    /// `Exists`; `Invalid` for an empty or unfinished file under a view's extension; `Full`; what the store answers.
    pub fn save(&self, path: &str, file: &File, attributes: FileAttributes, replace: bool) -> Result<Named> {
        let mut target = target(path);
        name::component(OsStr::new(&target.component))?;
        if target.component.is_empty() {
            return Err(Error::new(Kind::Invalid, "a file needs a name"));
        }
        target.vacancy = Vacancy::demanded(!replace);
        let bytes = MappedFile::map(file, file.metadata()?.len())?;
        let format = target.view.as_ref().map_or(Written::Plain, |(_, view)| format_of(*view));
        let Some(format) = verdict(bytes.as_slice(), format, Unfinished::Publish) else {
            return Err(Error::new(Kind::Invalid, format!("the file for {path:?} is empty")));
        };
        let free = || match self.taken(&[target.dataset(), &target.plain])? {
            Some(name) if !replace => Err(exists(&name)),
            _ => Ok(true),
        };
        free()?;
        let former = match self.resolve(&target, 0)? {
            Some(Found::Directory { .. }) => {
                return Err(Error::new(Kind::IsDirectory, format!("{path:?} is a directory")));
            }
            Some(Found::View(view)) => view.summary.attributes.as_deref().cloned(),
            _ => None,
        };
        let former = former.unwrap_or_default();
        let attributes = FileAttributes {
            mode: former.mode.or(attributes.mode),
            uid: former.uid.or(attributes.uid),
            gid: former.gid.or(attributes.gid),
            mtime: attributes.mtime.or(Some(Self::now())),
            atime: attributes.atime,
            ctime: Some(Self::now()),
            xattrs: if former.xattrs.is_empty() { attributes.xattrs } else { former.xattrs },
        };
        let input = StagedBytes { bytes: bytes.as_slice(), file };
        let published = self.publish_bytes(&target, format, &attributes, &input, &free)?;
        let (name, object) = published.ok_or_else(|| exists(path))?;
        let summary = self.objects.summary(&*self.store, object)?;
        Ok(self.named(name, object, None, summary))
    }

    /// Removes a dataset with all its views, or a name that has outlived its object.
    ///
    /// # Errors
    /// `NotFound` if somebody else was first; what the store answers.
    pub fn remove(&self, named: &Named) -> Result<()> {
        match self.remove_name(&named.name)? {
            true => Ok(()),
            false => Err(Error::not_found(format!("{:?} is removed or renamed already", named.name))),
        }
    }

    /// Gives a dataset another name, as a name or as the path of one of its views. A plain file that gets the extension
    /// of a view is looked at anew, as by a rename on a mount. Without `replace` nothing is replaced.
    ///
    /// # Errors
    /// `Exists`; `Invalid` for the extension of a view that the dataset does not have; what the store answers.
    pub fn change_name(&self, from: &Named, path: &str, replace: bool) -> Result<Named> {
        let mut to = target(path);
        name::component(OsStr::new(&to.component))?;
        if to.component.is_empty() {
            return Err(Error::new(Kind::Invalid, "a dataset needs a name"));
        }
        to.vacancy = Vacancy::demanded(!replace);
        let Some(summary) = &from.summary else { return Err(from.shown().err().unwrap_or_else(|| exists(path))) };
        let plain = summary.listed == View::Raw;
        let name = match &to.view {
            Some((dataset, view)) if summary.view(*view).is_some() => dataset.clone(),
            Some((dataset, view)) if !plain => {
                let what = no_view(&from.name, *view, summary);
                return Err(Error::new(Kind::Invalid, format!("{what}; name it {dataset:?}")));
            }
            _ => to.plain.clone(),
        };
        if name == from.name {
            return Ok(from.clone());
        }
        if plain && matches!(self.resolve(&to, 0)?, Some(Found::Directory { .. })) {
            return Err(Error::new(Kind::IsDirectory, format!("{path:?} is a directory")));
        }
        let path_names = [to.dataset(), &to.plain, &name];
        let taken = self.taken(&path_names)?.filter(|taken| !replace && *taken != from.name);
        if let Some(taken) = taken {
            return Err(exists(&taken));
        }
        if plain && to.view.is_some() && summary.broken.is_none() {
            let view = ViewNode {
                directory: name::split(&from.name).0.to_owned(),
                component: from.file_name(View::Raw),
                name: from.name.clone(),
                object: from.object,
                view: View::Raw,
                summary: summary.clone(),
            };
            self.rename_view(&view, &to, None)?;
            // No later writer joins the copy that was published.
            if let Some(staged) = self.staging.at(&to.path()) {
                self.staging.detach(&staged);
            }
        } else {
            self.change_name_of(&(from.name.clone(), from.object), &name, &path_names, &to.vacancy)?;
        }
        self.find(path)?.ok_or_else(|| Error::stale(format!("{path:?} was removed meanwhile")))
    }

    /// The warnings so far, which are forgotten then.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.warnings.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

fn exists(name: &str) -> Error {
    Error::new(Kind::Exists, format!("{name:?} exists already"))
}

/// The dataset has views, and not this one.
fn no_view(name: &str, view: View, summary: &Summary) -> Error {
    let there: Vec<String> = summary.sizes.iter().map(|(view, _)| suffix(*view)).filter(|s| !s.is_empty()).collect();
    let what = match (view.extension(), there.is_empty()) {
        (Some(extension), true) => format!("{name:?} has no .{extension} view: it is a plain file"),
        (Some(extension), false) => format!("{name:?} has no .{extension} view (it has {})", there.join(", ")),
        (None, _) => format!("{name:?} is no plain file (it has {})", there.join(", ")),
    };
    Error::not_found(what)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use serde_json::json;

    use super::*;
    use crate::vineyard::fake::{FakeStore, Op};

    fn bed() -> (Arc<FakeStore>, FileSystem) {
        let store = Arc::new(FakeStore::new(64 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        (store, fs)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = memory_file().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// An npy file of one number.
    fn npy(value: f64) -> File {
        let mut header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }".to_vec();
        header.resize(127, b' ');
        header.push(b'\n');
        header.extend(value.to_le_bytes());
        file(&header)
    }

    fn scalar(store: &FakeStore, name: &str) -> ObjectId {
        let content = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        store.put_object(name, content).unwrap()
    }

    #[test]
    fn every_listed_path_leads_back_to_its_name() {
        let (store, fs) = bed();
        let long = "é".repeat(200);
        let names = ["a", "a/b", "a/b.json", "100%", "x%00y", "..", "p/../q", "n\0ul/z", "two\nlines", &long];
        for name in names {
            scalar(&store, name);
        }
        let listed = fs.datasets("").unwrap();
        assert_eq!(listed.len(), names.len());
        for named in listed {
            let found = fs.find(&named.path).unwrap().unwrap_or_else(|| panic!("{:?}", named.path));
            assert_eq!(found.name, named.name, "by the path {:?}", named.path);
            assert!(named.path.split('/').all(|part| part.len() <= name::NAME_MAX));
            let found = fs.find(&named.name).unwrap().unwrap_or_else(|| panic!("{:?}", named.name));
            assert_eq!(found.object, named.object, "by the name {:?}", named.name);
        }
        assert_eq!(fs.datasets("a/").unwrap().len(), 2);
    }

    #[test]
    fn wrong_names_are_told_with_those_that_are_alike() {
        let (store, fs) = bed();
        for name in ["X_train", "X_test", "run/1/y_train"] {
            scalar(&store, name);
        }
        let message = |text: &str| fs.require(text).unwrap_err().to_string();
        assert!(message("X_trian.json").contains("there is \"X_train\""), "{}", message("X_trian.json"));
        assert!(message("y_train").contains("\"run/1/y_train\""));
        assert!(!message("something else").contains("there is"));
        assert_eq!(fs.require("run/1").unwrap_err().kind(), Kind::IsDirectory);
        let text = message("X_train.parquet");
        assert!(text.contains("no .parquet view (it has .json)"), "{text}");
    }

    #[test]
    fn saving_replaces_only_if_told_and_leaves_nothing_behind() {
        let (store, fs) = bed();
        let first = fs.save("d/x.npy", &npy(1.0), FileAttributes::default(), false).unwrap();
        assert_eq!((first.name.as_str(), first.path.as_str()), ("d/x", "d/x.npy"));
        let counts = || (store.object_count(), store.blob_count());
        let before = counts();
        let again = |replace| fs.save("d/x.npy", &npy(2.0), FileAttributes::default(), replace);
        assert_eq!(again(false).unwrap_err().kind(), Kind::Exists);
        for op in [Op::CreateBlobs, Op::SealBlobs, Op::CreateObjects, Op::Persist, Op::PutName] {
            store.fail_next(op, 1, Kind::Full);
            assert_eq!(again(true).unwrap_err().kind(), Kind::Full, "{op:?}");
            assert_eq!(counts(), before, "left over after {op:?}");
        }
        assert_eq!(fs.find("d/x").unwrap().unwrap().object, first.object);
        let second = again(true).unwrap();
        assert_ne!(second.object, first.object);
        assert_eq!(counts(), before);
        for (bytes, path) in [(&b""[..], "d/y.npy"), (b"x", "d"), (b"x", "d/")] {
            let error = fs.save(path, &file(bytes), FileAttributes::default(), true).unwrap_err();
            assert!(matches!(error.kind(), Kind::Invalid | Kind::IsDirectory), "{path}: {error}");
        }
        assert_eq!(counts(), before);
        fs.remove(&second).unwrap();
        assert_eq!(counts(), (0, 0));
    }

    #[test]
    fn a_replaced_file_keeps_its_owner_and_mode() {
        let (_store, fs) = bed();
        let own = FileAttributes { mode: Some(0o600), uid: Some(5), ..Default::default() };
        fs.save("f.txt", &file(b"1"), own, false).unwrap();
        let others = FileAttributes { mode: Some(0o644), uid: Some(6), gid: Some(7), ..Default::default() };
        let saved = fs.save("f.txt", &file(b"22"), others, true).unwrap();
        let kept = saved.summary.unwrap().attributes.clone().unwrap();
        assert_eq!((kept.mode, kept.uid, kept.gid), (Some(0o600), Some(5), Some(7)));
    }

    #[test]
    fn a_dataset_keeps_its_object_under_its_new_name_and_a_file_is_looked_at_anew() {
        let (store, fs) = bed();
        let object = scalar(&store, "old");
        scalar(&store, "taken");
        let old = fs.require("old").unwrap();
        assert_eq!(fs.change_name(&old, "taken", false).unwrap_err().kind(), Kind::Exists);
        assert_eq!(fs.change_name(&old, "new.npy", true).unwrap_err().kind(), Kind::Invalid);
        let moved = fs.change_name(&old, "taken.json", true).unwrap();
        assert_eq!((moved.name.as_str(), moved.object), ("taken", object));
        assert_eq!((store.object_count(), fs.find("old").unwrap().is_none()), (1, true));
        assert_eq!(fs.change_name(&moved, "taken", false).unwrap().object, object);

        fs.save("t.tmp", &npy(3.0), FileAttributes::default(), false).unwrap();
        let moved = fs.change_name(&fs.require("t.tmp").unwrap(), "t.npy", false).unwrap();
        assert_eq!((moved.name.as_str(), moved.view), ("t", View::Npy));
        assert!(fs.find("t.tmp").unwrap().is_none());
        assert_eq!(store.object_count(), 2);
    }

    #[test]
    fn a_name_that_outlived_its_object_is_told_and_can_be_removed() {
        let (store, fs) = bed();
        let object = scalar(&store, "gone");
        store.delete(&[object]).unwrap();
        let named = fs.require("gone").unwrap();
        assert_eq!(named.shown().unwrap_err().kind(), Kind::NotFound);
        assert!(fs.replaced_by("gone").unwrap().is_none(), "it is in nobody's way");
        assert_eq!(fs.change_name(&named, "other", true).unwrap_err().kind(), Kind::NotFound);
        fs.remove(&named).unwrap();
        assert!(fs.find("gone").unwrap().is_none() && fs.datasets("").unwrap().is_empty());
    }
}
