//! A pod of tests of the Kubernetes driver.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::csi::Node;
use super::vineyardd::environment;

/// A pod: it keeps one file open for reading and one for writing, reads and saves others all the time, and in the end
/// looks whether all is as it should be. A process of its own, because a child of a process with open files on a mount
/// that has no server hangs when it starts.
const POD: &str = "
import os, sys, time
target, stop, write = sys.argv[1:]
data = bytes((i // 7) % 256 for i in range(1 << 20)) * 8
with open(target + '/big.bin', 'wb') as f:
    f.write(data)
kept, half = open(target + '/big.bin', 'rb'), open(target + '/half.bin', 'w+b', buffering=0)
half.write(data[: 4 << 20])
print('ready', flush=True)
rounds, longest, lost = 0, 0, 0
while not os.path.exists(stop):
    begun = time.monotonic()
    with open(target + '/big.bin', 'rb') as f:
        assert f.read() == data, 'read'
    try:
        with open(f'{target}/note-{rounds % 3}', 'w') as f:
            f.write('x')
    except OSError:
        lost += 1
    rounds, longest = rounds + 1, max(longest, time.monotonic() - begun)
assert kept.read() == data, 'an open file goes on'
# How many saves meet the kill depends on the machine; each gets an error.
assert lost == 0 or write == 'no', f'{lost} saves failed'
if write == 'yes':
    half.write(data[4 << 20 :])
    half.close()
    with open(target + '/half.bin', 'rb') as f:
        assert f.read() == data, 'and so does one that is being written'
print(f'{rounds} rounds, the longest {longest:.2f} s')
";

/// The process of [`POD`] on the target `p`.
pub struct Pod {
    child: std::process::Child,
    said: BufReader<std::process::ChildStdout>,
    stop: PathBuf,
}

impl Pod {
    /// Starts it; `write`, which is `yes` or `no`, says whether its saves must go on.
    pub fn start(node: &Node, write: &str) -> Self {
        let stop = node.path("stop");
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "300"]).arg(environment().join("bin/python")).args(["-c", POD]);
        command.arg(node.target("p")).arg(&stop).arg(write);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut String::new()).unwrap();
        Pod { child, said, stop }
    }

    /// Tells it to end; what it says last.
    pub fn end(mut self) -> String {
        std::fs::write(&self.stop, "").unwrap();
        let ended = self.child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}
