//! Workflows as `vineyard-fs kedro argo generate` writes them, before Argo's linter: the pipeline of tests/kedro/iris,
//! as Kedro describes it, with every option. tests/kedro.rs does the same with the command and real projects.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::argo::{lint, program};
use serde_json::{Value, json};
use vineyard_fs::kedro::argo::{Generate, Per, Volume, tasks, workflow};
use vineyard_fs::kedro::introspect::Facts;

fn facts() -> Facts {
    let node = |name: &str, inputs: Value, outputs: Value, parents: Value| {
        json!({
            "name": name, "named": true, "tags": ["all"], "namespace": null, "inputs": inputs, "outputs": outputs,
            "parents": parents, "generator": false,
        })
    };
    let made = json!(["X_train", "X_test", "y_train", "y_test"]);
    let nodes = [
        node("split", json!(["example_iris_data", "parameters"]), made, json!([])),
        node("make_predictions", json!(["X_train", "X_test", "y_train"]), json!(["y_pred"]), json!(["split"])),
        node("report_accuracy", json!(["y_pred", "y_test"]), json!([]), json!(["split", "make_predictions"])),
    ];
    let facts = json!({
        "versions": {
            "python": "3.11.7", "kedro": "1.7.0", "kedro_datasets": "9.6.0", "pandas": "3.1.1", "pyarrow": "26.0.1",
            "polars": null,
        },
        "executable": "python", "conf_source": "/iris/conf", "base_env": "base", "run_env": "local", "env": "vineyard",
        "factories": true, "pipeline_names": ["__default__"],
        "pipelines": {"__default__": {"nodes": nodes, "datasets": {}}},
        "base": {}, "merged": {}, "local": [], "patterns": [], "warnings": [],
    });
    serde_json::from_value(facts).unwrap()
}

fn ask(volume: Volume, per: Per, full: bool) -> Generate {
    let text = |value: &str| full.then(|| value.to_owned());
    Generate {
        image: "localhost/iris:1".into(),
        pipeline: "__default__".into(),
        env: "vineyard".into(),
        mount: "/mnt/vineyard".into(),
        vineyard: (full || volume == Volume::HostPath).then(|| "vineyard-system/vineyardd".to_owned()),
        volume,
        per,
        memory: text("2Gi"),
        cpu: text("500m"),
        namespace: text("work"),
        service_account: text("runner"),
        retries: u32::from(full),
        deadline: full.then_some(600),
        ttl: full.then_some(60),
        params: if full { "train_fraction=0.7".into() } else { String::new() },
        keep: full,
    }
}

#[test]
fn workflows_pass_argos_linter() {
    let Some(argo) = program() else { return };
    let facts = facts();
    let mut linted = 0;
    for volume in [Volume::Csi, Volume::HostPath, Volume::Claim("data".into())] {
        for per in [Per::Node, Per::Tag] {
            for full in [false, true] {
                let ask = ask(volume.clone(), per, full);
                ask.validate().unwrap();
                let tasks = tasks(&facts.pipelines["__default__"], per).unwrap();
                let text = workflow("iris", &tasks, &ask, &facts);
                lint(&argo, text.as_bytes()).unwrap_or_else(|said| panic!("{said}\n{text}"));
                linted += 1;
            }
        }
    }
    println!("argo lint: {linted} workflows");
    // The linter sees a mistake.
    let good = workflow(
        "iris",
        &tasks(&facts.pipelines["__default__"], Per::Node).unwrap(),
        &ask(Volume::Csi, Per::Node, false),
        &facts,
    );
    let wrong = good.replace("template: node-near", "template: nowhere");
    assert!(wrong != good && lint(&argo, wrong.as_bytes()).unwrap_err().contains("nowhere"));
}
