//! Which Kedro dataset holds which object: the rules of `catalog create`.
//!
//! A pandas frame goes into an uncompressed Feather file (an Arrow IPC file: the form that every other reader of the
//! mount shares), polars and ibis tables into files that their own datasets read and write, everything else into a
//! pickle of protocol 5, which is never wrong. What a run really showed beats what an annotation says.

use super::introspect::{Observed, Versions, at_least};
use crate::error::{Error, Kind, Result};
use serde_json::{Map, Value, json};

/// What the user wants tables to be stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Arrow where the installed pandas can, else Parquet.
    #[default]
    Auto,
    /// Arrow IPC (`.arrow`).
    Arrow,
    /// Parquet (`.parquet`), uncompressed.
    Parquet,
    /// Pickle (`.pkl`) for everything.
    Pickle,
}

/// What is known about the object in a dataset.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    /// Type by annotation, of the producer or else of a consumer.
    pub hint: Option<String>,
    /// From a run.
    pub observed: Option<Observed>,
    /// Whether its producer yields chunks.
    pub generator: bool,
}

/// A catalog entry to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The dataset's name, transcoding included.
    pub name: String,
    /// `type`, `filepath` and the rest, in the order to write them.
    pub config: Map<String, Value>,
    /// Why this choice, where it is not obvious; one line.
    pub comment: Option<String>,
}

impl Planned {
    /// The dataset's class as written.
    pub fn class(&self) -> &str {
        self.config.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Where it lives.
    pub fn filepath(&self) -> &str {
        self.config.get("filepath").and_then(Value::as_str).unwrap_or_default()
    }
}

/// Why a dataset gets no entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// The dataset's name.
    pub name: String,
    /// One line.
    pub reason: String,
}

impl Left {
    /// A transcoding whose file another entry decides about.
    pub fn beside(name: &str, other: &str) -> Left {
        let reason = format!("the catalog has {other}, whose file it must share: write its entry by hand");
        Left { name: name.to_owned(), reason }
    }
}

/// The families of objects that the rules tell apart.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Family {
    PandasFrame {
        feather: Option<String>,
        parquet: Option<String>,
    },
    PandasSeries,
    PolarsFrame,
    PolarsLazy,
    IbisTable,
    /// A known type that is no table.
    Object,
    Unknown,
    /// It has to stay in memory.
    Unstorable(String),
}

fn family(knowledge: &Knowledge, suffix: Option<&str>) -> Family {
    if knowledge.generator {
        return Family::Unstorable(
            "its node yields chunks, and Kedro saves each chunk over the last: it stays in memory".into(),
        );
    }
    if let Some(observed) = &knowledge.observed {
        let kind = observed.kind.as_deref().unwrap_or_default();
        if let (Some(reason), true) = (&observed.pickle, !is_table(kind) || observed.feather.is_some()) {
            return Family::Unstorable(format!("it cannot be pickled ({reason}): it stays in memory"));
        }
        return match by_type(kind) {
            Family::PandasFrame { .. } => {
                Family::PandasFrame { feather: observed.feather.clone(), parquet: observed.parquet.clone() }
            }
            Family::PolarsFrame if observed.feather.is_some() => Family::Object,
            Family::Unknown => Family::Object,
            other => other,
        };
    }
    match (&knowledge.hint, suffix) {
        (Some(hint), _) => by_type(hint),
        (None, Some(suffix)) => by_suffix(suffix),
        (None, None) => Family::Unknown,
    }
}

fn is_table(kind: &str) -> bool {
    matches!(kind, "pandas.DataFrame" | "polars.DataFrame" | "polars.LazyFrame") || kind.starts_with("ibis.")
}

fn by_type(kind: &str) -> Family {
    match kind {
        "pandas.DataFrame" => Family::PandasFrame { feather: None, parquet: None },
        "pandas.Series" => Family::PandasSeries,
        "polars.DataFrame" => Family::PolarsFrame,
        "polars.LazyFrame" => Family::PolarsLazy,
        "ibis.Table" => Family::IbisTable,
        "object" | "typing.Any" => Family::Unknown,
        _ if kind.starts_with("pyspark.") => {
            Family::Unstorable("a Spark frame belongs to its session: write a spark.SparkDataset entry for it".into())
        }
        "collections.Iterator"
        | "collections.Generator"
        | "collections.AsyncIterator"
        | "collections.AsyncGenerator" => Family::Unstorable("an iterator cannot be stored: it stays in memory".into()),
        _ => Family::Object,
    }
}

/// `X@pandas`: by convention a transcoding is called after the library that reads it.
fn by_suffix(suffix: &str) -> Family {
    let suffix = suffix.to_ascii_lowercase();
    if suffix.contains("lazy") {
        Family::PolarsLazy
    } else if suffix.contains("polars") {
        Family::PolarsFrame
    } else if suffix.contains("pandas") {
        Family::PandasFrame { feather: None, parquet: None }
    } else if suffix.contains("ibis") {
        Family::IbisTable
    } else if suffix.contains("spark") {
        by_type("pyspark.DataFrame")
    } else {
        Family::Unknown
    }
}

/// The form of a table's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Arrow,
    Parquet,
    Pickle,
}

/// The rules, for one project's packages and one mount.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    /// Of the project's environment.
    pub versions: &'a Versions,
    /// Absolute path of the mount, without a slash at its end.
    pub mount: &'a str,
    /// What the user wants.
    pub format: Format,
}

impl Rules<'_> {
    /// The spelling of class names: kedro-datasets 1.8 and later, and every Kedro since 0.19, say `Dataset`.
    fn class(&self, stem: &str) -> String {
        let new = self.versions.kedro_datasets.as_deref().is_some_and(|version| at_least(version, (1, 8)));
        let new = new || self.versions.kedro_at_least((0, 19));
        format!("{stem}{}", if new { "Dataset" } else { "DataSet" })
    }

    fn datasets_at_least(&self, wanted: (u32, u32)) -> bool {
        self.versions.kedro_datasets.as_deref().is_some_and(|version| at_least(version, wanted))
    }

    /// pandas writes any index to Feather since 2.1.0; before, it refuses all but the default one.
    fn feather_keeps_an_index(&self) -> bool {
        self.versions.pandas.as_deref().is_none_or(|version| at_least(version, (2, 1)))
            && self.versions.kedro_at_least((0, 18))
    }

    /// The form that an object asks for, and why where that is not obvious.
    fn form(&self, family: &Family) -> (Form, Option<String>) {
        let wanted = match self.format {
            Format::Pickle => return (Form::Pickle, None),
            Format::Auto => None,
            Format::Arrow => Some(Form::Arrow),
            Format::Parquet => Some(Form::Parquet),
        };
        match family {
            Family::PandasFrame { feather, parquet } => {
                let form = wanted.unwrap_or(if self.feather_keeps_an_index() { Form::Arrow } else { Form::Parquet });
                match (form, feather, parquet) {
                    (Form::Arrow, Some(reason), _) => {
                        (Form::Pickle, Some(format!("A frame that Feather does not keep: {reason}")))
                    }
                    (Form::Parquet, _, Some(reason)) => {
                        (Form::Pickle, Some(format!("A frame that Parquet does not keep: {reason}")))
                    }
                    (Form::Parquet, ..) if wanted.is_none() => {
                        let pandas = self.versions.pandas.as_deref().unwrap_or_default();
                        (form, Some(format!("pandas {pandas} cannot write an index to Feather (2.1 and later can).")))
                    }
                    (form, ..) => (form, None),
                }
            }
            // `file_format` and both datasets came with kedro-datasets 1.8; ibis' file dataset with 5.1.
            Family::PolarsFrame if self.datasets_at_least((1, 8)) => (wanted.unwrap_or(Form::Arrow), None),
            Family::PolarsLazy if self.datasets_at_least((1, 8)) => {
                (Form::Parquet, Some("Kedro's lazy polars dataset reads CSV and Parquet only.".into()))
            }
            Family::IbisTable if self.datasets_at_least((5, 1)) => (Form::Parquet, None),
            Family::PolarsFrame | Family::PolarsLazy | Family::IbisTable => {
                let version = self.versions.kedro_datasets.as_deref().unwrap_or("without a version");
                (Form::Pickle, Some(format!("kedro-datasets {version} has no dataset for this kind of table.")))
            }
            Family::PandasSeries => (Form::Pickle, Some("A series: Feather and Parquet hold frames only.".into())),
            Family::Unknown => (
                Form::Pickle,
                Some("No annotation tells the type; pickle holds anything (--observe finds it out).".into()),
            ),
            Family::Object | Family::Unstorable(_) => (Form::Pickle, None),
        }
    }

    fn config(&self, family: &Family, form: Form, stem: &str) -> Map<String, Value> {
        let path = |extension: &str| Value::from(format!("{}/{stem}.{extension}", self.mount));
        let entry = match (form, family) {
            (Form::Arrow, Family::PandasFrame { .. }) if self.versions.kedro_at_least((0, 18)) => json!({
                "type": self.class("pandas.Feather"), "filepath": path("arrow"),
                "save_args": {"compression": "uncompressed"},
            }),
            // Kedro 0.17's class passes nothing on to pandas.
            (Form::Arrow, Family::PandasFrame { .. }) => json!({
                "type": self.class("pandas.Feather"), "filepath": path("arrow"),
            }),
            (Form::Parquet, Family::PandasFrame { .. }) => json!({
                "type": self.class("pandas.Parquet"), "filepath": path("parquet"),
                "save_args": {"compression": null},
            }),
            (Form::Arrow, Family::PolarsFrame) => json!({
                "type": self.class("polars.EagerPolars"), "filepath": path("arrow"), "file_format": "ipc",
            }),
            (Form::Parquet, Family::PolarsFrame) => json!({
                "type": self.class("polars.EagerPolars"), "filepath": path("parquet"), "file_format": "parquet",
                "save_args": {"compression": "uncompressed"},
            }),
            (Form::Parquet, Family::PolarsLazy) => json!({
                "type": self.class("polars.LazyPolars"), "filepath": path("parquet"), "file_format": "parquet",
                "save_args": {"compression": "uncompressed"},
            }),
            (Form::Parquet, Family::IbisTable) => json!({
                "type": "ibis.FileDataset", "filepath": path("parquet"), "file_format": "parquet",
            }),
            _ => json!({
                "type": self.class("pickle.Pickle"), "filepath": path("pkl"),
                "save_args": {"protocol": self.protocol()},
            }),
        };
        match entry {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// Pickle protocol 5 writes a large buffer in one piece; Python has it since 3.8.
    fn protocol(&self) -> u32 {
        if at_least(&self.versions.python, (3, 8)) { 5 } else { 4 }
    }

    /// The entries of one dataset: one, or one for each transcoding (`X@pandas`, `X@polars`), which share a file.
    ///
    /// # Errors
    /// [`Kind::NameTooLong`] if the name does not fit a file name.
    pub fn plan(&self, uses: &[(String, Knowledge)]) -> Result<std::result::Result<Vec<Planned>, Vec<Left>>> {
        let families: Vec<(&str, Family)> = uses
            .iter()
            .map(|(name, knowledge)| (name.as_str(), family(knowledge, name.split_once('@').map(|(_, suffix)| suffix))))
            .collect();
        if families.iter().any(|(_, family)| matches!(family, Family::Unstorable(_))) {
            let left = families.iter().map(|(name, family)| Left {
                name: (*name).to_owned(),
                reason: match family {
                    Family::Unstorable(reason) => reason.clone(),
                    _ => "another transcoding of it cannot be stored".into(),
                },
            });
            return Ok(Err(left.collect()));
        }
        let mut forms: Vec<(Form, Option<String>)> = families.iter().map(|(_, family)| self.form(family)).collect();
        let shared = forms.iter().map(|(form, _)| *form).max_by_key(|form| match form {
            Form::Arrow => 0,
            Form::Parquet => 1,
            Form::Pickle => 2,
        });
        if let Some(shared) = shared.filter(|_| uses.len() > 1) {
            let stem = uses.first().map(|(name, _)| stripped(name)).unwrap_or_default();
            for (form, comment) in &mut forms {
                *comment = Some(format!("One file for every transcoding of {}.", one_line(stem)));
                *form = shared;
            }
        }
        let planned = families.iter().zip(forms).map(|((name, family), (form, comment))| {
            let stem = file_stem(stripped(name))?;
            let config = self.config(family, form, &stem);
            Ok(Planned { name: (*name).to_owned(), config, comment: comment.map(|comment| one_line(&comment)) })
        });
        Ok(Ok(planned.collect::<Result<Vec<_>>>()?))
    }

    /// The entry of a dataset that has to stay in memory.
    pub fn memory(&self, left: &Left) -> Planned {
        let config = Map::from_iter([("type".to_owned(), Value::from("MemoryDataset"))]);
        let mut comment = one_line(&left.reason);
        if !self.versions.kedro_at_least((1, 0)) {
            comment.push_str("; before Kedro 1, ParallelRunner refuses a catalog that says so: use another runner");
        }
        Planned { name: left.name.clone(), config, comment: Some(comment) }
    }

    /// The factory that takes whatever no other entry does.
    pub fn catch_all(&self) -> Planned {
        Planned {
            name: "{default_dataset}".into(),
            config: self.config(&Family::Object, Form::Pickle, "{default_dataset}"),
            comment: Some("Whatever has no entry of its own; misspelt inputs, too, are looked for here.".into()),
        }
    }
}

/// `X@pandas` is the dataset `X`.
pub fn stripped(name: &str) -> &str {
    name.split_once('@').map_or(name, |(stem, _)| stem)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A dataset's name as a path below the mount, without the extension. A `/` makes folders, as it does in vineyard.
/// Parts that no file can be called (empty, `.`, `..`, with a control character) are percent-encoded.
///
/// # Errors
/// [`Kind::NameTooLong`] if a part leaves no room for the extension in the 255 bytes of a file name.
pub fn file_stem(name: &str) -> Result<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        let mut safe = String::new();
        for c in part.chars() {
            if c.is_control() {
                let mut bytes = [0_u8; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    safe.push_str(&format!("%{byte:02X}"));
                }
            } else {
                safe.push(c);
            }
        }
        match part {
            "" => safe.push_str("%00"),
            "." | ".." => safe = safe.replace('.', "%2E"),
            _ => {}
        }
        if safe.len() > 255 - ".parquet".len() {
            return Err(Error::new(
                Kind::NameTooLong,
                format!("the dataset {name:?} has a name of more than 247 bytes, which no file can have: shorten it"),
            ));
        }
        parts.push(safe);
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn versions(kedro: &str, datasets: &str, pandas: &str) -> Versions {
        Versions {
            python: "3.11.7".into(),
            kedro: kedro.into(),
            kedro_datasets: Some(datasets.into()),
            pandas: Some(pandas.into()),
            pyarrow: Some("26.0".into()),
            polars: Some("2.1".into()),
        }
    }

    fn plan_with(versions: &Versions, format: Format, uses: &[(&str, Option<&str>)]) -> Vec<Planned> {
        let rules = Rules { versions, mount: "/mnt/vineyard", format };
        let uses: Vec<_> = uses
            .iter()
            .map(|(name, hint)| {
                ((*name).to_owned(), Knowledge { hint: hint.map(str::to_owned), ..Knowledge::default() })
            })
            .collect();
        rules.plan(&uses).unwrap().unwrap()
    }

    fn new_plan(uses: &[(&str, Option<&str>)]) -> Vec<Planned> {
        plan_with(&versions("1.7.0", "9.6.0", "3.1.1"), Format::Auto, uses)
    }

    #[test]
    fn a_frame_is_an_uncompressed_feather_file() {
        let planned = new_plan(&[("X_train", Some("pandas.DataFrame"))]);
        assert_eq!(
            serde_json::to_string(&planned[0].config).unwrap(),
            r#"{"type":"pandas.FeatherDataset","filepath":"/mnt/vineyard/X_train.arrow","save_args":{"compression":"uncompressed"}}"#
        );
        assert_eq!(planned[0].comment, None);
    }

    #[test]
    fn old_pandas_gets_parquet_and_old_kedro_its_own_spelling() {
        let old = versions("0.18.14", "1.7.1", "2.0.3");
        let planned = plan_with(&old, Format::Auto, &[("X", Some("pandas.DataFrame"))]);
        assert_eq!((planned[0].class(), planned[0].filepath()), ("pandas.ParquetDataSet", "/mnt/vineyard/X.parquet"));
        assert!(planned[0].comment.as_deref().unwrap().contains("2.0.3"));
        let planned = plan_with(&old, Format::Auto, &[("X", Some("polars.DataFrame"))]);
        assert_eq!(planned[0].class(), "pickle.PickleDataSet");
    }

    #[test]
    fn what_is_no_frame_or_unknown_is_pickled() {
        for hint in [Some("pandas.Series"), Some("numpy.ndarray"), Some("geopandas.GeoDataFrame"), None] {
            let planned = new_plan(&[("y", hint)]);
            assert_eq!(planned[0].class(), "pickle.PickleDataset", "{hint:?}");
            assert_eq!(planned[0].config["save_args"]["protocol"], 5);
        }
    }

    #[test]
    fn transcodings_share_a_file() {
        let planned = new_plan(&[("X@pandas", None), ("X@polars", None)]);
        assert_eq!(planned[0].class(), "pandas.FeatherDataset");
        assert_eq!(planned[1].class(), "polars.EagerPolarsDataset");
        assert!(planned.iter().all(|entry| entry.filepath() == "/mnt/vineyard/X.arrow"));
        let planned = new_plan(&[("X@pandas", None), ("X@lazy", None)]);
        assert_eq!(planned[0].class(), "pandas.ParquetDataset");
        assert!(planned.iter().all(|entry| entry.filepath() == "/mnt/vineyard/X.parquet"));
    }

    #[test]
    fn an_observation_beats_an_annotation() {
        let versions = versions("1.7.0", "9.6.0", "3.1.1");
        let rules = Rules { versions: &versions, mount: "/m", format: Format::Auto };
        let seen = |kind: &str, feather: Option<&str>, pickle: Option<&str>| Knowledge {
            hint: Some("pandas.DataFrame".into()),
            observed: Some(Observed {
                kind: Some(kind.into()),
                feather: feather.map(str::to_owned),
                parquet: None,
                pickle: pickle.map(str::to_owned),
                chunks: false,
            }),
            generator: false,
        };
        let one = |knowledge| rules.plan(&[("x".to_owned(), knowledge)]).unwrap();
        assert_eq!(one(seen("pandas.Series", None, None)).unwrap()[0].class(), "pickle.PickleDataset");
        let refused = one(seen("pandas.DataFrame", Some("ValueError: Duplicate column names"), None)).unwrap();
        assert_eq!(refused[0].class(), "pickle.PickleDataset");
        assert!(refused[0].comment.as_deref().unwrap().contains("Duplicate"));
        let left = one(seen("builtins.function", None, Some("PicklingError: lambda"))).unwrap_err();
        assert!(left[0].reason.contains("lambda"));
    }

    #[test]
    fn chunks_stay_in_memory() {
        let versions = versions("1.7.0", "9.6.0", "3.1.1");
        let rules = Rules { versions: &versions, mount: "/m", format: Format::Auto };
        let knowledge = Knowledge { generator: true, ..Knowledge::default() };
        assert!(rules.plan(&[("chunk".to_owned(), knowledge)]).unwrap().is_err());
    }

    #[test]
    fn names_become_paths() {
        assert_eq!(file_stem("ns.out").unwrap(), "ns.out");
        assert_eq!(file_stem("a/b c:ü").unwrap(), "a/b c:ü");
        assert_eq!(file_stem("../x//y").unwrap(), "%2E%2E/x/%00/y");
        assert_eq!(file_stem("a\nb").unwrap(), "a%0Ab");
        assert_eq!(file_stem(&"x".repeat(250)).unwrap_err().kind(), Kind::NameTooLong);
    }
}
