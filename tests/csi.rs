//! The Kubernetes driver from outside: both of its processes, asked over gRPC as a kubelet asks, with a real vineyardd
//! and real mounts. Needs root and `/dev/fuse`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::csi::{Node, mounts_at, shell, undo, writer};
use common::pod::Pod;
use common::point::{freeze, signal, wait_until};
use common::vineyardd::Vineyardd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;
use tonic::transport::Channel;
use vineyard_fs::csi::proto::identity_client::IdentityClient;
use vineyard_fs::csi::proto::volume_capability::access_mode::Mode;
use vineyard_fs::csi::proto::volume_capability::{AccessMode, AccessType, BlockVolume};
use vineyard_fs::csi::proto::volume_usage::Unit;
use vineyard_fs::csi::proto::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};

#[test]
fn the_driver_tells_what_it_is() {
    let node = Node::new();
    let mut identity = IdentityClient::new(node.channel.clone().unwrap());
    node.runtime.block_on(async {
        let info = identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.name, "fs.vineyard.v6d.io");
        assert!(!info.vendor_version.is_empty());
        let capable = identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
        assert!(capable.capabilities.is_empty());
        let info = node.node().node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.node_id, "n1");
        let capable = node.node().node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap().into_inner();
        assert_eq!(capable.capabilities.len(), 3);
    });
    let ready = |identity: &mut IdentityClient<Channel>| {
        node.runtime.block_on(identity.probe(ProbeRequest {})).unwrap().into_inner().ready
    };
    wait_until("the mounter answers", || ready(&mut identity) == Some(true));
}

#[test]
fn an_inline_volume_is_published_written_measured_and_taken_away_twice_each() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p1", &[]);
    let target = node.target("p1");
    node.publish(request.clone()).unwrap();
    node.publish(request.clone()).unwrap();
    assert_eq!(mounts_at(&target).len(), 1, "published twice, mounted once");
    std::fs::write(target.join("a.txt"), "hello").unwrap();
    assert_eq!(std::fs::read_to_string(target.join("a.txt")).unwrap(), "hello");
    let stats = node.stats(&request).unwrap();
    assert!(!stats.volume_condition.as_ref().unwrap().abnormal, "{stats:?}");
    let bytes = stats.usage.iter().find(|usage| usage.unit() == Unit::Bytes).unwrap();
    assert_eq!(bytes.total, 64 << 20);
    assert_eq!(bytes.total, bytes.used + bytes.available);
    let mut other = request.clone();
    other.volume_id = "other".into();
    assert_eq!(node.stats(&other).unwrap_err().code(), Code::NotFound);
    node.unpublish(&request).unwrap();
    node.unpublish(&request).unwrap();
    assert!(mounts_at(&target).is_empty() && !target.exists());
    assert_eq!(node.stats(&request).unwrap_err().code(), Code::NotFound);
    assert_eq!(std::fs::read_dir(node.path("kubelet/plugins/fs/targets")).unwrap().count(), 0);
}

#[test]
fn another_way_to_publish_at_the_same_place_is_refused() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p1", &[("prefix", "run-1")]);
    node.publish(request.clone()).unwrap();
    let read_only = NodePublishVolumeRequest { readonly: true, ..request.clone() };
    let volume = NodePublishVolumeRequest { volume_id: "other".into(), ..request.clone() };
    let group = NodePublishVolumeRequest { volume_capability: Some(writer("5")), ..request.clone() };
    let prefix = node.request("p1", &[("prefix", "run-2")]);
    for (differs, what) in
        [(read_only, "readonly"), (volume, "volume_id"), (group, "volume_mount_group"), (prefix, "attributes")]
    {
        let status = node.publish(differs).unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{what}");
        assert!(status.message().contains(what), "{}", status.message());
    }
    node.publish(request.clone()).unwrap();
    assert_eq!(mounts_at(&node.target("p1")).len(), 1);
    node.unpublish(&request).unwrap();
}

#[test]
fn read_only_volumes_refuse_writing_and_leave_others_alone() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let writable = node.request("w", &[]);
    node.publish(writable.clone()).unwrap();
    std::fs::write(node.target("w").join("a.txt"), "hello").unwrap();
    let by_pod = NodePublishVolumeRequest { readonly: true, ..node.request("r1", &[]) };
    let by_attribute = node.request("r2", &[("readOnly", "true")]);
    let mut capability = writer("");
    capability.access_mode = Some(AccessMode { mode: Mode::MultiNodeReaderOnly.into() });
    let by_mode = NodePublishVolumeRequest { volume_capability: Some(capability), ..node.request("r3", &[]) };
    for (pod, request) in [("r1", by_pod), ("r2", by_attribute), ("r3", by_mode)] {
        node.publish(request.clone()).unwrap();
        let target = node.target(pod);
        assert_eq!(std::fs::read_to_string(target.join("a.txt")).unwrap(), "hello");
        let refused = std::fs::write(target.join("b.txt"), "").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS), "{pod}");
        assert!(mounts_at(&target)[0].options.split(',').any(|option| option == "ro"));
        node.unpublish(&request).unwrap();
    }
    std::fs::write(node.target("w").join("b.txt"), "still").unwrap();
    node.unpublish(&writable).unwrap();
}

#[test]
fn prefixes_keep_pods_apart_and_go_with_the_last_one() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let (all, one, same, two) = (
        node.request("all", &[]),
        node.request("one", &[("prefix", "team/run 1")]),
        node.request("same", &[("prefix", "team/run 1")]),
        node.request("two", &[("prefix", "team/run-2")]),
    );
    for request in [&all, &one, &same, &two] {
        node.publish(request.clone()).unwrap();
    }
    assert_eq!(mounts_at(&node.target("one"))[0].root, "/team/run\\0401");
    assert_eq!(mounts_at(&node.target("one"))[0].device, mounts_at(&node.target("two"))[0].device, "one server");
    std::fs::write(node.target("one").join("a.txt"), "mine").unwrap();
    assert_eq!(std::fs::read_to_string(node.target("same").join("a.txt")).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(node.target("all").join("team/run 1/a.txt")).unwrap(), "mine");
    assert_eq!(std::fs::read_dir(node.target("two")).unwrap().count(), 0);
    assert_eq!(shell(&format!("cd '{}' && cd .. && pwd -P && ls", node.target("two").display())).lines().count(), 2);
    std::fs::remove_file(node.target("same").join("a.txt")).unwrap();
    let shown = |name: &str| node.target("all").join("team").join(name).exists();
    node.unpublish(&one).unwrap();
    assert!(shown("run 1"), "another pod still uses it");
    // It has a second to remove the directory, and leaves it there otherwise: that depends on the machine.
    for _ in 0..10 {
        node.unpublish(&same).unwrap();
        if !shown("run 1") {
            break;
        }
        node.publish(same.clone()).unwrap();
    }
    assert!(!shown("run 1") && shown("run-2"));
    std::fs::write(node.target("two").join("b.txt"), "stays").unwrap();
    node.unpublish(&two).unwrap();
    assert_eq!(std::fs::read_to_string(node.target("all").join("team/run-2/b.txt")).unwrap(), "stays");
    node.unpublish(&all).unwrap();
    // What is saved under the name of the first part is not a directory.
    node.publish(all.clone()).unwrap();
    std::fs::write(node.target("all").join("plain"), "file").unwrap();
    let status = node.publish(node.request("three", &[("prefix", "plain/x")])).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
    node.unpublish(&all).unwrap();
}

#[test]
fn the_group_of_a_pod_owns_the_files_and_may_write() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request =
        NodePublishVolumeRequest { volume_capability: Some(writer("8737")), ..node.request("g", &[("prefix", "x")]) };
    let plain = node.request("p", &[("prefix", "x")]);
    node.publish(request.clone()).unwrap();
    node.publish(plain.clone()).unwrap();
    let at = |pod: &str| node.target(pod).display().to_string();
    let set = "setpriv --clear-groups --reuid 1000 --regid 1000";
    let by = |groups: &str| format!("setpriv --groups {groups} --reuid 1000 --regid 1000");
    assert_eq!(shell(&format!("stat -c %g:%a {}", at("g"))), "8737:775\n");
    // The test's folder itself is closed to others, so the mount is entered as root.
    shell(&format!("cd {} && {} sh -c 'echo hello > a.txt'", at("g"), by("8737")));
    shell(&format!("cd {} && ! {set} sh -c 'echo hello > b.txt' 2>/dev/null", at("g")));
    shell(&format!("cd {} && {set} sh -c 'echo hello > c.txt && cat a.txt'", at("p")));
    assert_ne!(mounts_at(&node.target("g"))[0].device, mounts_at(&node.target("p"))[0].device);
    for request in [request, plain] {
        node.unpublish(&request).unwrap();
    }
}

#[test]
fn requests_that_cannot_work_are_refused_with_a_reason() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let good = || node.request("p", &[]);
    let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..writer("") };
    for (request, what) in [
        (NodePublishVolumeRequest { volume_id: String::new(), ..good() }, "volume_id"),
        (NodePublishVolumeRequest { target_path: String::new(), ..good() }, "target_path"),
        (NodePublishVolumeRequest { target_path: "/etc/x".into(), ..good() }, "kubelet"),
        (NodePublishVolumeRequest { volume_capability: None, ..good() }, "volume_capability"),
        (NodePublishVolumeRequest { volume_capability: Some(VolumeCapability::default()), ..good() }, "access_type"),
        (NodePublishVolumeRequest { volume_capability: Some(block), ..good() }, "block"),
        (node.request("p", &[("socket", "/run/x")]), "socket"),
        (node.request("p", &[("prefix", "../x")]), "prefix"),
        (node.request("p", &[("format", "csv")]), "format"),
        (node.request("p", &[("vineyard", "../x")]), "NAMESPACE/NAME"),
        (node.request("p", &[("vineyard", "")]), "vineyard"),
    ] {
        let status = node.publish(request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {}", status.message());
        assert!(status.message().contains(what), "{}", status.message());
    }
    for wrong in [
        NodeUnpublishVolumeRequest { volume_id: "v".into(), target_path: String::new() },
        NodeUnpublishVolumeRequest { volume_id: String::new(), target_path: good().target_path },
        NodeUnpublishVolumeRequest { volume_id: "v".into(), target_path: "/etc".into() },
    ] {
        let status = node.runtime.block_on(node.node().node_unpublish_volume(wrong)).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    assert!(!node.target("p").exists(), "nothing is left of what was refused");
}

#[test]
fn a_target_that_is_something_else_is_left_as_it_is() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let at = |pod: &str| {
        std::fs::create_dir_all(node.target(pod).parent().unwrap()).unwrap();
        node.target(pod)
    };
    std::fs::write(at("file"), "precious").unwrap();
    std::os::unix::fs::symlink("/etc", at("link")).unwrap();
    std::fs::create_dir(at("used")).unwrap();
    std::fs::write(at("used").join("x"), "precious").unwrap();
    std::fs::create_dir(at("other")).unwrap();
    shell(&format!("mount -t tmpfs none '{}'", at("other").display()));
    for (pod, code, what) in [
        ("file", Code::InvalidArgument, "is a file"),
        ("link", Code::InvalidArgument, "symbolic link"),
        ("used", Code::FailedPrecondition, "not empty"),
        ("other", Code::FailedPrecondition, "tmpfs"),
    ] {
        let status = node.publish(node.request(pod, &[])).unwrap_err();
        assert_eq!(status.code(), code, "{pod}");
        assert!(status.message().contains(what), "{}", status.message());
    }
    assert_eq!(std::fs::read_to_string(at("used").join("x")).unwrap(), "precious");
    assert_eq!(mounts_at(&at("other")).len(), 1);
    // But a pod can always be deleted.
    for pod in ["file", "link", "used", "other"] {
        node.unpublish(&node.request(pod, &[])).unwrap();
    }
    assert_eq!(std::fs::read_to_string(at("file")).unwrap(), "precious");
    assert!(mounts_at(&at("other")).is_empty());
}

#[test]
fn two_calls_for_one_target_at_once_leave_one_mount() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[]);
    let results: Vec<_> = node.runtime.block_on(async {
        let calls = (0..8).map(|_| {
            let (mut client, request) = (node.node(), request.clone());
            tokio::spawn(async move { client.node_publish_volume(request).await })
        });
        let mut results = Vec::new();
        for call in calls.collect::<Vec<_>>() {
            results.push(call.await.unwrap());
        }
        results
    });
    assert!(results.iter().any(Result::is_ok));
    for status in results.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::Aborted, "{}", status.message());
    }
    assert_eq!(mounts_at(&node.target("p")).len(), 1);
    node.unpublish(&request).unwrap();
}

#[test]
fn a_vineyardd_that_comes_late_is_waited_for_and_one_that_does_not_is_named() {
    let mut node = Node::with("3s");
    let request = node.request("p", &[]);
    let begun = Instant::now();
    let status = node.publish(request.clone()).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("no vineyardd system/v on this node"), "{}", status.message());
    assert!(begun.elapsed() > Duration::from_secs(1) && begun.elapsed() < Duration::from_secs(30));
    assert!(mounts_at(&node.target("p")).is_empty());
    let store = Vineyardd::start("64Mi");
    node.channel = None;
    Node::stop(&mut node.plugin, Signal::SIGTERM);
    node.start_plugin("60s");
    std::thread::scope(|scope| {
        let publishing = scope.spawn(|| node.publish(request.clone()));
        std::thread::sleep(Duration::from_millis(500));
        node.add(&store, "v");
        publishing.join().unwrap().unwrap();
    });
    assert_eq!(mounts_at(&node.target("p")).len(), 1);
    node.unpublish(&request).unwrap();
    // A pod that never got its volume can be deleted too.
    node.unpublish(&node.request("never", &[])).unwrap();
}

#[test]
fn a_dead_mount_is_repaired_under_its_targets_and_by_publishing_again() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[("prefix", "run")]);
    node.publish(request.clone()).unwrap();
    let target = node.target("p");
    std::fs::write(target.join("a.txt"), "safe").unwrap();
    let device = mounts_at(&target)[0].device.clone();
    let minor: u32 = device.split(':').nth(1).unwrap().parse().unwrap();
    vineyard_fs::fuse::mount::abort((0, minor)).unwrap();
    // The driver may have repaired it already.
    if let Err(error) = std::fs::read_dir(&target) {
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTCONN));
    }
    node.publish(request.clone()).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("a.txt")).unwrap(), "safe");
    let again = mounts_at(&target);
    assert_ne!(again.last().unwrap().device, device);
    // Without a kubelet that asks: the driver looks by itself.
    let minor: u32 = again.last().unwrap().device.split(':').nth(1).unwrap().parse().unwrap();
    vineyard_fs::fuse::mount::abort((0, minor)).unwrap();
    wait_until("the target is bound again", || {
        std::fs::read_to_string(target.join("a.txt")).is_ok_and(|text| text == "safe")
    });
    node.unpublish(&request).unwrap();
}

#[test]
fn a_hung_mount_is_measured_revived_and_unmounted_in_time() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[]);
    node.publish(request.clone()).unwrap();
    let target = node.target("p");
    std::fs::write(target.join("a.txt"), "safe").unwrap();
    let stopped = node.pid("server");
    freeze(stopped);
    let begun = Instant::now();
    let stats = node.stats(&request).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20));
    // Its own watch over targets may have replaced the server already.
    if let Some(condition) = stats.volume_condition.filter(|condition| condition.abnormal) {
        assert!(condition.message.contains("has not answered"), "{}", condition.message);
    }
    node.publish(request.clone()).unwrap();
    assert_ne!(node.pid("server"), stopped, "the server was replaced");
    assert_eq!(shell(&format!("cat {}/a.txt", target.display())), "safe");
    let stopped = node.pid("server");
    freeze(stopped);
    let begun = Instant::now();
    node.unpublish(&request).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(9), "it waits for no server: {:?}", begun.elapsed());
    assert!(mounts_at(&target).is_empty());
    kill(Pid::from_raw(stopped), Signal::SIGCONT).ok();
}

#[test]
fn both_processes_may_be_replaced_while_a_pod_reads_and_writes() {
    let (store, mut node) = (Vineyardd::start("256Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[("prefix", "run")]);
    node.publish(request.clone()).unwrap();
    let target = node.target("p");
    let device = mounts_at(&target)[0].device.clone();
    let pod = Pod::start(&node, "yes");
    // The mounter first: its keeper hands the mount to the node plugin, and the next one takes it from there.
    for _ in 0..2 {
        Node::stop(&mut node.mounter, Signal::SIGTERM);
        assert_eq!(mounts_at(&target)[0].device, device);
        node.start_mounter();
        std::thread::sleep(Duration::from_secs(1));
        node.publish(request.clone()).unwrap();
        assert_eq!(mounts_at(&target)[0].device, device, "the same mount");
    }
    node.channel = None;
    Node::stop(&mut node.plugin, Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    node.start_plugin("10s");
    // The keeper gives the new plugin its connection, so the mounter may be replaced once more.
    std::thread::sleep(Duration::from_millis(1500));
    Node::stop(&mut node.mounter, Signal::SIGTERM);
    node.start_mounter();
    node.publish(request.clone()).unwrap();
    assert_eq!(mounts_at(&target)[0].device, device);
    // Both at once: the mounter waits for the next plugin.
    node.channel = None;
    Node::stop(&mut node.plugin, Signal::SIGTERM);
    let mut ending = node.mounter.take().unwrap();
    kill(Pid::from_raw(ending.id() as i32), Signal::SIGTERM).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    node.start_plugin("10s");
    ending.wait().unwrap();
    node.start_mounter();
    node.publish(request.clone()).unwrap();
    assert_eq!(mounts_at(&target)[0].device, device);
    println!("a pod while both processes are replaced: {}", pod.end());
    node.unpublish(&request).unwrap();
}

/// Pods that are deleted by force end after the next ones have started.
#[test]
fn processes_that_end_late_leave_the_sockets_of_the_next_alone() {
    let (store, mut node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[]);
    node.publish(request.clone()).unwrap();
    std::fs::write(node.target("p").join("a.txt"), "safe").unwrap();
    let (mut plugin, mut mounter) = (node.plugin.take(), node.mounter.take());
    let sockets = ["csi.sock", "kubelet/plugins/fs/holder.sock", "kubelet/plugins/fs/mounter.sock"];
    let inodes =
        |node: &Node| sockets.map(|name| std::fs::symlink_metadata(node.path(name)).map(|file| file.ino()).ok());
    let before = inodes(&node);
    node.channel = None;
    node.start_mounter();
    node.start_plugin("10s");
    let fresh = |node: &Node| inodes(node).iter().zip(&before).all(|(now, before)| now.is_some() && now != before);
    wait_until("the next ones listen", || fresh(&node));
    node.connect();
    Node::stop(&mut mounter, Signal::SIGTERM);
    Node::stop(&mut plugin, Signal::SIGTERM);
    assert!(fresh(&node), "their sockets are still there");
    let next = node.request("q", &[]);
    node.publish(next.clone()).unwrap();
    node.publish(request.clone()).unwrap();
    assert_eq!(
        shell(&format!("cat {}/a.txt {}/a.txt", node.target("p").display(), node.target("q").display())),
        "safesafe"
    );
    // Somebody removes the socket that the kubelet asks at.
    std::fs::remove_file(node.path("csi.sock")).unwrap();
    wait_until("it is there again", || node.path("csi.sock").exists());
    node.unpublish(&request).unwrap();
    node.unpublish(&next).unwrap();
}

/// What happens to the processes of a container that is killed: only the connection outlives them, so a file that is
/// being written is lost, with an error for its writer.
#[test]
fn a_killed_mounter_leaves_the_mount_to_the_next() {
    let (store, mut node) = (Vineyardd::start("256Mi"), Node::new());
    node.add(&store, "v");
    let request = node.request("p", &[("prefix", "run")]);
    node.publish(request.clone()).unwrap();
    let device = mounts_at(&node.target("p"))[0].device.clone();
    let pod = Pod::start(&node, "no");
    let keeper = node.pid("keeper");
    Node::stop(&mut node.mounter, Signal::SIGKILL);
    signal(keeper, Signal::SIGKILL);
    node.start_mounter();
    std::thread::sleep(Duration::from_secs(1));
    node.publish(request.clone()).unwrap();
    assert_eq!(mounts_at(&node.target("p"))[0].device, device, "the same mount");
    println!("a pod while the mounter is killed: {}", pod.end());
    node.unpublish(&request).unwrap();
}

#[test]
fn several_vineyardds_have_mounts_of_their_own_which_go_when_nobody_uses_them() {
    let (one, two) = (Vineyardd::start("64Mi"), Vineyardd::start("64Mi"));
    let mut node = Node::new();
    node.add(&one, "v");
    node.add(&two, "w");
    let (first, second) = (node.request("p", &[]), node.request("q", &[("vineyard", "system/w")]));
    node.publish(first.clone()).unwrap();
    node.publish(second.clone()).unwrap();
    std::fs::write(node.target("p").join("a.txt"), "in v").unwrap();
    assert_eq!(std::fs::read_dir(node.target("q")).unwrap().count(), 0);
    node.unpublish(&first).unwrap();
    node.unpublish(&second).unwrap();
    node.channel = None;
    Node::stop(&mut node.mounter, Signal::SIGTERM);
    Node::stop(&mut node.plugin, Signal::SIGTERM);
    let left = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!left.contains(node.path("kubelet").to_str().unwrap()), "no mount is left");
    assert!(!node.path("kubelet/plugins/fs").exists(), "no file is left");
}

#[test]
fn tables_are_listed_in_the_format_that_a_volume_asks_for() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let (arrow, parquet) = (node.request("a", &[]), node.request("b", &[("format", "parquet")]));
    node.publish(arrow.clone()).unwrap();
    // A table that another client put, not saved as a file: its recipe would name the view.
    let code = "import sys, pandas, vineyard; \
                vineyard.connect(sys.argv[1]).put(pandas.DataFrame({'a': [1, 2]}), name='t', persist=True)";
    let output = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .arg(common::vineyardd::environment().join("bin/python"))
        .args(["-c", code])
        .arg(store.socket())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    node.publish(parquet.clone()).unwrap();
    let listed = |pod: &str| -> Vec<String> {
        let entries = std::fs::read_dir(node.target(pod)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!((listed("a"), listed("b")), (vec!["t.arrow".to_owned()], vec!["t.parquet".to_owned()]));
    node.unpublish(&arrow).unwrap();
    node.unpublish(&parquet).unwrap();
}

/// Prints the figures; the limits are wide, because tests share the machine.
#[test]
fn a_hundred_volumes_come_and_go_at_once() {
    let (store, node) = (Vineyardd::start("64Mi"), Node::with("120s"));
    node.add(&store, "v");
    let first = node.request("first", &[]);
    node.publish(first.clone()).unwrap();
    let mut times: Vec<Duration> = Vec::new();
    for round in 0..20 {
        let request = node.request(&format!("one-{round}"), &[("prefix", "x")]);
        let begun = Instant::now();
        node.publish(request.clone()).unwrap();
        times.push(begun.elapsed());
        node.unpublish(&request).unwrap();
    }
    times.sort_unstable();
    let requests: Vec<_> =
        (0..100).map(|pod| node.request(&format!("pod-{pod}"), &[("prefix", &format!("run-{}", pod % 10))])).collect();
    let begun = Instant::now();
    let all = |publish: bool| {
        node.runtime.block_on(async {
            let calls = requests.iter().cloned().map(|request| {
                let mut client = node.node();
                tokio::spawn(async move {
                    match publish {
                        true => client.node_publish_volume(request).await.map(drop),
                        false => client.node_unpublish_volume(undo(&request)).await.map(drop),
                    }
                })
            });
            for call in calls.collect::<Vec<_>>() {
                call.await.unwrap().unwrap();
            }
        });
    };
    all(true);
    let published = begun.elapsed();
    assert!(requests.iter().all(|request| mounts_at(Path::new(&request.target_path)).len() == 1));
    all(false);
    let took = begun.elapsed();
    assert!(requests.iter().all(|request| !Path::new(&request.target_path).exists()));
    node.unpublish(&first).unwrap();
    assert_eq!(std::fs::read_dir(node.path("kubelet/plugins/fs/targets")).unwrap().count(), 0);
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.plugin.as_ref().unwrap().id())).unwrap();
    let memory = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let kib: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!(
        "publish to a running mount: median {:?}, worst {:?}; 100 at once: published in {published:?}, all in {took:?}; \
         peak memory of the node plugin {} MiB",
        times[10],
        times[19],
        kib >> 10
    );
    assert!(times[10] < Duration::from_secs(2) && took < Duration::from_secs(100));
    assert!(kib < 40 << 10, "{kib} KiB");
}
