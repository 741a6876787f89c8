//! What is shown at a target of the Kubernetes driver, where calls meet each other or end half-way, or mounts are in
//! folders of the node. Needs root and `/dev/fuse`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::csi::{Node, mounts_at, undo};
use common::vineyardd::Vineyardd;

/// The directory of a prefix goes with its last pod, but not from under the next one.
#[test]
fn a_prefix_is_handed_from_one_pod_to_the_next() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    // The mount stays.
    let all = node.request("all", &[]);
    node.publish(all.clone()).unwrap();
    let request = |pod: usize| node.request(&format!("p{pod}"), &[("prefix", "team/run-7")]);
    node.publish(request(0)).unwrap();
    for pod in 1..60 {
        let (former, next) = (undo(&request(pod - 1)), request(pod));
        let (one, two) = node.runtime.block_on(async {
            let (mut one, mut two) = (node.node(), node.node());
            let going = tokio::spawn(async move { one.node_unpublish_volume(former).await.map(drop) });
            let coming = tokio::spawn(async move { two.node_publish_volume(next).await.map(drop) });
            (going.await.unwrap(), coming.await.unwrap())
        });
        one.unwrap();
        two.unwrap();
        let target = node.target(&format!("p{pod}"));
        assert_eq!(mounts_at(&target).last().unwrap().root, "/team/run-7", "pod {pod}");
        std::fs::write(target.join("a.txt"), "mine").unwrap_or_else(|error| panic!("pod {pod}: {error}"));
        std::fs::remove_file(target.join("a.txt")).unwrap();
    }
    node.unpublish(&request(59)).unwrap();
    node.unpublish(&all).unwrap();
}
