//! What is shown at a target of the Kubernetes driver, where calls meet each other or end half-way, or mounts are in
//! folders of the node. Needs root and `/dev/fuse`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::csi::{Node, mounts_at, shell, undo, writer};
use common::point::wait_until;
use common::vineyardd::Vineyardd;
use nix::sys::signal::Signal;
use tonic::Code;
use vineyard_fs::csi::proto::NodePublishVolumeRequest;

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

/// A call that was to publish read-only and ended in between leaves a target that can be written.
#[test]
fn a_read_only_volume_that_is_writable_is_made_anew() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = NodePublishVolumeRequest { readonly: true, ..node.request("r", &[]) };
    node.publish(request.clone()).unwrap();
    let target = node.target("r");
    let mounts = std::fs::read_dir(node.path("kubelet/plugins/fs/mounts")).unwrap();
    let mount = mounts.map(|entry| entry.unwrap().path()).next().unwrap();
    shell(&format!("umount '{0}' && mount --bind '{1}' '{0}'", target.display(), mount.display()));
    // The driver may be looking after it at this moment.
    wait_until("it is published", || match node.publish(request.clone()) {
        Ok(()) => true,
        Err(status) => {
            assert_eq!(status.code(), Code::Aborted, "{}", status.message());
            false
        }
    });
    let refused = std::fs::write(target.join("b.txt"), "").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS));
    assert_eq!(mounts_at(&target).len(), 1);
    // Without a kubelet that asks: the driver looks by itself.
    shell(&format!("umount '{0}' && mount --bind '{1}' '{0}'", target.display(), mount.display()));
    wait_until("it is read-only again", || {
        mounts_at(&target).last().is_some_and(|there| there.options.split(',').any(|option| option == "ro"))
    });
    node.unpublish(&request).unwrap();
    // But what the kubelet asks for otherwise is another volume.
    let writable = node.request("r", &[]);
    node.publish(writable.clone()).unwrap();
    assert_eq!(node.publish(request).unwrap_err().code(), Code::AlreadyExists);
    node.unpublish(&writable).unwrap();
}

/// Each group's mount has memory of its own, so there is a limit; what no pod uses any more makes room.
#[test]
fn a_vineyardd_has_so_many_mounts_and_no_more() {
    let (store, mut node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    node.start_mounter_with(&["--max-mounts", "2", "-o", "cache_size=64M"]);
    let request = |pod: &str, group: &str| NodePublishVolumeRequest {
        volume_capability: Some(writer(group)),
        ..node.request(pod, &[])
    };
    let (one, two, same, three) = (request("a", "1"), request("b", "2"), request("c", "2"), request("d", "3"));
    for fits in [&one, &two, &same] {
        node.publish(fits.clone()).unwrap();
    }
    let status = node.publish(three.clone()).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
    assert!(status.message().contains("has 2 mounts on this node already"), "{}", status.message());
    assert!(mounts_at(&node.target("d")).is_empty());
    node.publish(two.clone()).unwrap();
    // Minutes pass before an unused one goes, but not when another may need its place.
    node.unpublish(&one).unwrap();
    wait_until("there is room", || node.publish(three.clone()).is_ok());
    for request in [two, same, three] {
        node.unpublish(&request).unwrap();
    }
}

/// The mounts of `hostPath.enabled` serve volumes, too.
#[test]
fn a_mount_in_a_folder_of_the_node_is_published_and_its_prefixes_go() {
    let (store, mut node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let host = node.path("host");
    node.start_mounter_with(&["--host-dir", host.to_str().unwrap(), "--always", "system/v"]);
    let mount = host.join("system/v");
    wait_until("it is mounted", || !mounts_at(&mount).is_empty());
    let (all, run) = (node.request("all", &[]), node.request("run", &[("prefix", "team/run-7")]));
    node.publish(all.clone()).unwrap();
    node.publish(run.clone()).unwrap();
    let device = |pod: &str| mounts_at(&node.target(pod))[0].device.clone();
    assert_eq!(device("all"), mounts_at(&mount)[0].device);
    assert_eq!(device("run"), mounts_at(&mount)[0].device);
    std::fs::write(node.target("run").join("a.txt"), "mine").unwrap();
    assert_eq!(std::fs::read_to_string(mount.join("team/run-7/a.txt")).unwrap(), "mine");
    std::fs::remove_file(mount.join("team/run-7/a.txt")).unwrap();
    // It has a second to remove the directory, and leaves it there otherwise: that depends on the machine.
    for _ in 0..10 {
        node.unpublish(&run).unwrap();
        if !mount.join("team").exists() {
            break;
        }
        node.publish(run.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!mount.join("team").exists());
    node.unpublish(&all).unwrap();
    node.channel = None;
    Node::stop(&mut node.plugin, Signal::SIGTERM);
    Node::stop(&mut node.mounter, Signal::SIGTERM);
    assert!(mounts_at(&mount).is_empty());
}
