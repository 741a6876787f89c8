//! The Kedro tools on real projects, with each Kedro that they promise to work with.
//!
//! `VINEYARD_FS_KEDRO_VENVS` names a folder with the environments `kedro018`, `kedro019` and `kedro1`
//! (`tests/kedro/requirements-*.txt`); those that are not there are left out, with a line that says so. Without the variable
//! all tests are ignored: scripts/test --full sets it. The mount is an ordinary folder, or the one that
//! `VINEYARD_FS_KEDRO_MOUNT` names.
#![allow(clippy::unwrap_used)]

#[path = "common/argo.rs"]
mod argo;

#[path = "kedro/catalog.rs"]
mod catalog;
#[path = "kedro/project.rs"]
mod project;
#[path = "kedro/run.rs"]
mod run;
#[allow(dead_code)]
#[path = "common/vineyardd.rs"]
mod vineyardd;

use project::{files, kedros, names, refused, success, text};
use std::fs;
use std::process::Command;

const ACCURACY: &str = "Model has accuracy of 0.933";
const IRIS: [&str; 5] = ["X_test.arrow", "X_train.arrow", "y_pred.pkl", "y_test.pkl", "y_train.pkl"];

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_pipeline_shares_its_data_with_every_runner_and_node_by_node() {
    for kedro in kedros() {
        assert!(kedro.kedro_run(&[]).contains(ACCURACY), "{}", kedro.name);
        let said = success(kedro.ours(&["catalog", "create", "-p", "__default__"]));
        assert!(said.contains("kedro run --env vineyard") && said.contains("not local"), "{said}");
        let written = fs::read_to_string(kedro.catalog_file("__default__")).unwrap();

        for runner in ["SequentialRunner", "ThreadRunner", "ParallelRunner"] {
            let said = kedro.kedro_run(&["--env", "vineyard", "--runner", runner]);
            assert!(said.contains(ACCURACY), "{} {runner}: {said}", kedro.name);
            assert_eq!(names(&kedro.mount), IRIS, "{} {runner}", kedro.name);
            success(kedro.ours(&["clean", "-p", "__default__"]));
            assert_eq!(names(&kedro.mount), [""; 0], "{} {runner}", kedro.name);
        }
        let flag = if kedro.name == "kedro018" { "--node" } else { "--nodes" };
        for node in ["split", "make_predictions", "report_accuracy"] {
            let said = kedro.kedro_run(&["--env", "vineyard", flag, node]);
            assert_eq!(said.contains(ACCURACY), node == "report_accuracy", "{}: {said}", kedro.name);
        }
        let equal = kedro.python(&format!(
            "import pandas as pd, pickle; from iris.pipelines.iris import split_data\n\
             data = pd.read_csv('data/01_raw/iris.csv')\n\
             parts = split_data(data, dict(train_fraction=0.8, random_state=3, target_column='species'))\n\
             read = pd.read_feather(r'{0}/X_train.arrow')\n\
             pd.testing.assert_frame_equal(read, parts[0])\n\
             pd.testing.assert_series_equal(pickle.load(open(r'{0}/y_test.pkl', 'rb')), parts[3])\n\
             print(len(read))",
            kedro.mount.display()
        ));
        assert_eq!(equal.trim(), "120");

        let said = success(kedro.ours(&["catalog", "create", "-p", "__default__"]));
        assert!(said.contains("nothing to do"), "{said}");
        assert_eq!(fs::read_to_string(kedro.catalog_file("__default__")).unwrap(), written);

        let listed = kedro.ours(&["catalog", "list", "-p", "__default__", "--json"]);
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        let rows = listed["pipelines"]["__default__"].as_array().unwrap();
        let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
        assert_eq!((&row("X_train")["kind"], &row("X_train")["rows"]), (&"vineyard".into(), &120.into()));
        assert_eq!(row("example_iris_data")["kind"], "catalog");
        assert_eq!(row("parameters")["kind"], "parameter");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn observing_finds_what_annotations_do_not_tell() {
    for kedro in kedros() {
        let before = files(&kedro.project);
        let said = success(kedro.ours(&["catalog", "create", "-p", "mixed", "--observe", "--dry-run"]));
        assert!(said.contains("+++ conf/vineyard/catalog/mixed.yml"), "{said}");
        assert!(said.contains("left out chunk"), "{said}");
        assert!(files(&kedro.project) == before, "a dry run changed files");

        success(kedro.ours(&["catalog", "create", "-p", "mixed", "--observe"]));
        let catalog: serde_yaml::Value =
            serde_yaml::from_str(&fs::read_to_string(kedro.catalog_file("mixed")).unwrap()).unwrap();
        let class = |name: &str| catalog[name]["type"].as_str().unwrap().to_owned();
        assert_eq!(class("mixed"), "pandas.FeatherDataset");
        assert_eq!(class("twice"), "pickle.PickleDataset", "two columns of one name");
        assert_eq!(class("wide"), "polars.EagerPolarsDataset");
        assert_eq!(class("lazy"), "polars.LazyPolarsDataset");
        assert_eq!(class("outer.inner.model"), "pickle.PickleDataset");
        assert!(catalog.get("chunk").is_none());
        assert!(kedro.kedro_run(&["--pipeline", "mixed"]).contains("score 0.967 total 395"));
        let said = kedro.kedro_run(&["--pipeline", "mixed", "--env", "vineyard"]);
        assert!(said.contains("score 0.967 total 395"), "{}: {said}", kedro.name);
        assert!(names(&kedro.mount).contains(&"final score.pkl".to_owned()));
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn what_the_user_wrote_stays() {
    for kedro in kedros() {
        let file = kedro.catalog_file("__default__");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let mine = "# My catalog\n_csv: &csv\n  type: pandas.CSVDataset\n\n# as text, to look at\nX_test:\n  <<: *csv # short\n  filepath: data/x_test.csv\n";
        fs::write(&file, mine).unwrap();
        let said = success(kedro.ours(&["catalog", "create"]));
        assert!(said.contains("kept X_test"), "{said}");
        assert!(said.contains("@@"), "the diff of a file of theirs is shown: {said}");
        let written = fs::read_to_string(&file).unwrap();
        assert!(written.starts_with(mine) && written.contains("X_train:"), "{written}");
        assert!(!kedro.project.join("conf/base/catalog.yml").with_extension("tmp").exists());

        let said = success(kedro.ours(&["catalog", "create", "--force"]));
        assert!(said.contains("X_test  pandas.FeatherDataset"), "{said}");
        let forced = fs::read_to_string(&file).unwrap();
        assert!(forced.starts_with("# My catalog\n_csv: &csv\n  type: pandas.CSVDataset\n\n# as text, to look at\nX_test:\n  type: pandas.FeatherDataset\n"), "{forced}");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn factories_and_other_files_of_the_environment_count() {
    for kedro in kedros() {
        let base = kedro.project.join("conf/base/catalog.yml");
        let text = fs::read_to_string(&base).unwrap();
        fs::write(
            &base,
            format!("{text}\n\"y_{{part}}\":\n  type: pickle.PickleDataset\n  filepath: data/y_{{part}}.pkl\n"),
        )
        .unwrap();
        fs::create_dir_all(kedro.project.join("conf/vineyard")).unwrap();
        fs::write(
            kedro.project.join("conf/vineyard/catalog_mine.yml"),
            "X_test:\n  type: pickle.PickleDataset\n  filepath: data/x_test.pkl\n",
        )
        .unwrap();
        success(kedro.ours(&["catalog", "create", "--catch-all"]));
        let written = fs::read_to_string(kedro.catalog_file("__default__")).unwrap();
        let catalog: serde_yaml::Mapping = serde_yaml::from_str(&written).unwrap();
        let keys: Vec<&str> = catalog.keys().map(|key| key.as_str().unwrap()).collect();
        assert_eq!(keys, ["X_train", "{default_dataset}"]);
        let said = success(kedro.ours(&["catalog", "create", "--catch-all"]));
        assert!(said.contains("nothing to do"), "{said}");
        let said = kedro.kedro_run(&["--env", "vineyard"]);
        assert!(said.contains(ACCURACY), "{said}");
        let listed = success(kedro.ours(&["catalog", "list", "-p", "__default__"]));
        assert!(listed.contains("data/y_train.pkl"), "{listed}");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_run_leaves_the_project_as_it_was() {
    for kedro in kedros() {
        let before = files(&kedro.project);
        for runner in ["SequentialRunner", "ThreadRunner", "ParallelRunner"] {
            let said = success(kedro.ours(&["run", "--existing", "--", "--runner", runner]));
            assert!(said.contains(ACCURACY), "{} {runner}: {said}", kedro.name);
            assert!(said.contains("FeatherDataset"), "{} {runner}: {said}", kedro.name);
            assert_eq!(names(&kedro.mount), [""; 0], "{} {runner}", kedro.name);
        }
        let mut after = files(&kedro.project);
        // Kedro's own logging configuration may write this one.
        after.remove(&kedro.project.join("info.log"));
        assert!(after == before, "{}", kedro.name);
        success(kedro.ours(&["run", "--existing", "--keep"]));
        let kept = names(&kedro.mount);
        assert_eq!(names(&kedro.mount.join(&kept[0])), IRIS);
        let failed = kedro.ours(&["run", "--existing", "--", "--runner", "NoSuchRunner"]);
        assert!(failed.status.code().is_some_and(|code| code != 0), "{}", text(&failed));
        assert_eq!(names(&kedro.mount), kept, "a failed run cleans up");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn bad_input_is_one_line_and_changes_nothing() {
    for kedro in kedros() {
        let create = ["catalog", "create"];
        refused(&kedro, &["catalog", "create", "-p", "nope"], "mixed");
        refused(&kedro, &["catalog", "create", "-p", "a/b"], "a/b");
        refused(&kedro, &["catalog", "create", "--env", "../x"], "environment");
        refused(&kedro, &["catalog", "create", "--env", "base"], "every run");
        refused(&kedro, &["catalog", "create", "--python", "/no/such/python"], "no such file");
        refused(&kedro, &["catalog", "create", "--python", "/bin/cat"], "cat");
        refused(&kedro, &["catalog", "create", "--project", "/"], "not in a Kedro project");
        refused(&kedro, &["catalog", "list", "-p", "nope"], "nope");
        refused(&kedro, &["argo", "generate", "-i", "x y"], "image");
        refused(&kedro, &["argo", "generate", "-i", "x", "--memory", "lots"], "quantity");
        refused(&kedro, &["argo", "generate", "-i", "x"], "catalog create");
        refused(&kedro, &["run", "--existing", "--", "--env", "nope"], "nope");

        let file = kedro.catalog_file("__default__");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        for broken in ["X_train: [\n", "- a\n", "X_train: {type: a\nb: c"] {
            fs::write(&file, broken).unwrap();
            refused(&kedro, &create, "catalog");
        }
        fs::write(&file, "{X_train: {type: pandas.CSVDataset, filepath: x.csv}}\n").unwrap();
        refused(&kedro, &create, "by hand");
        fs::remove_file(&file).unwrap();

        let nodes = kedro.project.join("src/iris/pipelines/mixed.py");
        let good = fs::read_to_string(&nodes).unwrap();
        fs::write(&nodes, format!("import no_such_module\n{good}")).unwrap();
        refused(&kedro, &create, "no_such_module");
        fs::write(&nodes, format!("def broken(:\n{good}")).unwrap();
        refused(&kedro, &create, "mixed.py:1");
        fs::write(&nodes, format!("import sys; sys.exit(3)\n{good}")).unwrap();
        refused(&kedro, &create, "SystemExit");
        fs::write(&nodes, format!("import os; os._exit(3)\n{good}")).unwrap();
        refused(&kedro, &create, "ended");
        fs::write(&nodes, format!("print('{{\"ok\": 1}}')\ninput_is_closed = __import__('sys').stdin.read()\n{good}"))
            .unwrap();
        success(kedro.ours(&["catalog", "create", "--dry-run"]));
        fs::write(&nodes, good).unwrap();

        let pyproject = kedro.project.join("pyproject.toml");
        let good = fs::read_to_string(&pyproject).unwrap();
        for (broken, part) in [("[tool.kedro", "TOML"), ("[tool.kedro]\nproject_name = 'x'\n", "package_name")] {
            fs::write(&pyproject, broken).unwrap();
            refused(&kedro, &create, part);
        }
        let other = good
            .lines()
            .map(|line| if line.starts_with("kedro_init") { "kedro_init_version = \"0.15.0\"" } else { line });
        fs::write(&pyproject, other.collect::<Vec<_>>().join("\n")).unwrap();
        refused(&kedro, &create, "0.15.0");
        fs::write(&pyproject, good).unwrap();
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn workflows_name_every_node_once() {
    let argo = argo::program();
    for kedro in kedros() {
        refused(&kedro, &["argo", "generate", "-i", "x", "--env", "nope"], "no environment");
        refused(&kedro, &["argo", "generate", "-i", "x", "--volume", "hostpath"], "--vineyard");
        success(kedro.ours(&["catalog", "create"]));
        success(kedro.ours(&["catalog", "create", "-p", "mixed", "--observe"]));
        let said = kedro.ours(&["argo", "generate", "-i", "iris:1", "-p", "mixed", "-o", "-"]);
        assert_eq!(said.status.code(), Some(1));
        assert!(text(&said).contains("chunk") && text(&said).contains("--per tag"), "{}", text(&said));
        let workflow = |arguments: &[&str]| -> serde_yaml::Value {
            let all = [&["argo", "generate", "-i", "iris:1", "-o", "-"], arguments].concat();
            let output = kedro.ours(&all);
            assert!(output.status.success(), "{}", text(&output));
            if let Some(program) = &argo {
                argo::lint(program, &output.stdout).unwrap();
            }
            serde_yaml::from_slice(&output.stdout).unwrap()
        };
        let tasks = |workflow: &serde_yaml::Value| -> Vec<(String, String)> {
            let tasks = workflow["spec"]["templates"][0]["dag"]["tasks"].as_sequence().unwrap();
            let text = |value: &serde_yaml::Value| value.as_str().unwrap().to_owned();
            tasks.iter().map(|t| (text(&t["name"]), text(&t["arguments"]["parameters"][0]["value"]))).collect()
        };
        let iris = workflow(&[]);
        assert_eq!(
            tasks(&iris).iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["split", "make-predictions", "report-accuracy"]
        );
        assert_eq!(iris["spec"]["onExit"], "clean");
        assert_eq!(iris["spec"]["volumes"][0]["csi"]["volumeAttributes"]["prefix"], "{{workflow.name}}");
        let args = iris["spec"]["templates"][1]["container"]["args"].as_sequence().unwrap();
        let flag = if kedro.name == "kedro018" { "--node" } else { "--nodes" };
        assert!(args.contains(&flag.into()) && args.contains(&"--env".into()));

        let tagged =
            tasks(&workflow(&["-p", "mixed", "--per", "tag", "--volume", "hostpath", "--vineyard", "a/b", "--keep"]));
        assert!(tagged.contains(&("chunked".to_owned(), "chunks,count_chunk".to_owned())), "{tagged:?}");
        // What a task runs is what its pod would run: every node in a process of its own.
        for (_, nodes) in &tagged {
            kedro.kedro_run(&["--env", "vineyard", "--pipeline", "mixed", "--params", "", flag, nodes]);
        }

        success(kedro.ours(&["argo", "generate", "-i", "iris:1"]));
        assert!(success(kedro.ours(&["argo", "generate", "-i", "iris:1"])).contains("nothing to do"));
        let differs = kedro.ours(&["argo", "generate", "-i", "iris:2"]);
        assert_eq!(differs.status.code(), Some(1), "{}", text(&differs));
        success(kedro.ours(&["argo", "generate", "-i", "iris:2", "--force"]));
        assert!(fs::read_to_string(kedro.project.join("argo-iris.yml")).unwrap().contains("iris:2"));
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn images() {
    for kedro in kedros() {
        let bin = kedro.project.join("engines");
        fs::create_dir(&bin).unwrap();
        let docker = bin.join("docker");
        let ours = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vineyard-fs"));
            command.args(["kedro", "docker"]).args(arguments).current_dir(&kedro.project).env("PATH", &bin);
            command.env("VIRTUAL_ENV", kedro.bin.parent().unwrap()).output().unwrap()
        };
        let none = ours(&["build"]);
        assert_eq!(none.status.code(), Some(1));
        assert!(text(&none).contains("install docker, podman or buildah"), "{}", text(&none));

        let engine = |code: u8| {
            fs::write(&docker, format!("#!/bin/sh\necho \"$@\"\nexit {code}\n")).unwrap();
            Command::new("chmod").arg("+x").arg(&docker).status().unwrap();
        };
        engine(1);
        let failed = ours(&["build"]);
        assert_eq!(failed.status.code(), Some(1));
        assert!(!kedro.project.join("Dockerfile").exists(), "a failed build leaves nothing");
        engine(0);
        let said = success(ours(&[
            "build",
            "--platform",
            "linux/arm64",
            "--base-image",
            "local/python:1",
            "--",
            "--no-cache",
        ]));
        assert!(said.contains("-t iris:0.1.0") && said.contains("--platform linux/arm64 --no-cache"), "{said}");
        assert!(said.contains("BASE_IMAGE=local/python:1"), "{said}");
        let file = fs::read_to_string(kedro.project.join("Dockerfile")).unwrap();
        // It is left out of the image, and Kedro does not start without it.
        assert!(file.contains("RUN mkdir -p conf/local "), "{file}");
        assert!(file.contains("COPY requirements.txt") && file.contains("USER 8737:8737"), "{file}");
        fs::write(kedro.project.join("Dockerfile"), "FROM mine\n").unwrap();
        let said = success(ours(&["init"]));
        assert!(said.contains("-FROM mine") && said.contains("kept"), "{said}");
        assert_eq!(fs::read_to_string(kedro.project.join("Dockerfile")).unwrap(), "FROM mine\n");
    }
}
