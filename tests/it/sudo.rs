//! Started through sudo (contract B5): the port is root's work, everything else the invoking user's.
//!
//! Each test runs itself once more as root in namespaces of its own: a network, where port 80 is free and needs a privilege,
//! and mounts, where the user database has a user of the test's.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use http::StatusCode;
use kube_tunnel::testing::FakeCluster;

use crate::app::web;
use crate::client::fetch;
use crate::kubeconfig::with_user;
use crate::program::{Done, Lines, Running, program, run_command};

/// Marks the run in the namespaces.
const INSIDE: &str = "KUBE_TUNNEL_TEST_NAMESPACES";

const WEB: &str = "web.shop.svc.cluster.local";

/// The user who calls sudo, their group, and another one that the group database puts them in.
const UID: u32 = 4321;
const GID: u32 = 4322;
const SECOND_GROUP: u32 = 4400;

/// Reports whether this is the run in the namespaces; if not, makes it happen and checks how it ended.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--map-root-user", "--map-auto"]);
    }
    let done = command
        .args(["--mount", "--net", "--", "sh", "-c"])
        .arg("ip link set lo up && exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("this test needs unshare (util-linux) and ip (iproute2)");
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success() && said.contains("1 passed"),
        "run as root this test needs the right to make namespaces, else subordinate user ids (newuidmap and /etc/subuid); \
         where there is neither: sudo -E cargo test --test it sudo\n{said}"
    );
    false
}

/// The invoking user with a home folder, and a folder that is root's home.
struct Homes {
    user: tempfile::TempDir,
    root: tempfile::TempDir,
}

impl Homes {
    /// Adds the user to the user database of this mount namespace.
    fn new() -> Self {
        let (user, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        chown(user.path(), Some(UID), Some(GID)).unwrap();
        let home = user.path().display();
        append("/etc/passwd", &format!("alice:x:{UID}:{GID}::{home}:/bin/sh\n"));
        append("/etc/group", &format!("second:x:{SECOND_GROUP}:alice\n"));
        Self { user, root }
    }

    /// Writes a file that is the user's and readable by nobody else.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.user.path().join(name);
        let folder = path.parent().unwrap();
        fs::create_dir_all(folder).unwrap();
        chown(folder, Some(UID), Some(GID)).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&path, Some(UID), Some(GID)).unwrap();
        path
    }

    /// The program as sudo starts it for the user `uid`.
    fn sudo(&self, uid: u32, arguments: &[&str]) -> Command {
        let mut command = program(arguments);
        command
            .env("HOME", self.root.path())
            .env("SUDO_UID", uid.to_string())
            .env("SUDO_GID", GID.to_string())
            .env("SUDO_USER", "alice");
        command
    }

    /// A credential plugin that notes who runs it, and the kubeconfig that calls it.
    fn plugin(&self, cluster: &FakeCluster) -> String {
        let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"plugin-token"}}"#;
        let note = self.user.path().join("note");
        let script = format!(
            "#!/bin/sh\numask 022\n{{ id -u; id -ru; id -g; id -G; echo \"$HOME\"; echo \"$USER\"; }} > {}\necho '{credential}'\n",
            note.display()
        );
        let plugin = self.write("plugin", &script);
        cluster.add_token("plugin", "plugin-token");
        let user = format!(
            "exec:\n  apiVersion: client.authentication.k8s.io/v1\n  command: {}\n  interactiveMode: Never",
            plugin.display()
        );
        with_user(&cluster.kubeconfig(), &user)
    }

    /// What the plugin noted.
    fn note(&self) -> String {
        fs::read_to_string(self.user.path().join("note")).unwrap()
    }
}

/// Adds a line to a file of this mount namespace.
fn append(path: &str, line: &str) {
    let mut text = fs::read_to_string(path).unwrap();
    text.push_str(line);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).unwrap();
    let mounted = Command::new("mount")
        .arg("--bind")
        .arg(file.path())
        .arg(path)
        .status();
    assert!(mounted.unwrap().success());
}

async fn start(command: &mut Command) -> (Running, Lines) {
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let log = Lines::new(running.0.stderr.take().unwrap());
    (running, log.until("listening").await)
}

/// The lines of these names in the status of every thread of a process, without repetitions.
fn statuses(process: u32, names: &[&str]) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(format!("/proc/{process}/task"))
        .unwrap()
        .flat_map(|task| {
            let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let wanted = |line: &&str| names.iter().any(|name| line.starts_with(name));
            text.lines().filter(wanted).map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The owners of everything below a folder, without repetitions.
fn owners(folder: &Path, into: &mut Vec<(u32, u32)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        into.push((metadata.uid(), metadata.gid()));
        if metadata.is_dir() {
            owners(&path, into);
        }
    }
    into.sort_unstable();
    into.dedup();
}

#[tokio::test]
async fn a_low_port_is_bound_and_all_else_is_the_invoking_users() {
    if !inside("sudo::a_low_port_is_bound_and_all_else_is_the_invoking_users") {
        return;
    }
    let cluster = FakeCluster::start().await.unwrap();
    let _workload = web(&cluster, 1);
    let homes = Homes::new();
    homes.write(".kube/config", &homes.plugin(&cluster));

    let alone = run_command(program(&[]).env("HOME", homes.user.path()).uid(UID)).await;
    assert!(
        alone.stderr.contains("no permission to listen"),
        "{}",
        alone.stderr
    );

    let (running, log) = start(&mut homes.sudo(UID, &[])).await;
    let address = SocketAddr::from(([127, 0, 0, 1], 80));
    assert_eq!(fetch(address, WEB, "/").await.status, StatusCode::OK);

    let home = homes.user.path().display();
    assert_eq!(
        homes.note(),
        format!("{UID}\n{UID}\n{GID}\n{GID} {SECOND_GROUP}\n{home}\nalice\n")
    );
    assert!(
        homes.user.path().join(".local/state/kube-tunnel/tls").is_dir(),
        "{:#?}",
        log.seen
    );
    let mut all = Vec::new();
    owners(homes.user.path(), &mut all);
    assert_eq!(all, [(UID, GID)], "everything in the user's home is theirs");
    assert_eq!(
        fs::read_dir(homes.root.path()).unwrap().count(),
        0,
        "root's home was used"
    );

    // Real, effective, saved and file-system ids, and no capability to change them: there is no way back.
    let none = "0000000000000000";
    assert_eq!(
        statuses(
            running.0.id(),
            &["Uid:", "Gid:", "Groups:", "CapPrm:", "CapEff:", "CapAmb:"]
        ),
        [
            format!("CapAmb:\t{none}"),
            format!("CapEff:\t{none}"),
            format!("CapPrm:\t{none}"),
            format!("Gid:\t{GID}\t{GID}\t{GID}\t{GID}"),
            format!("Groups:\t{GID} {SECOND_GROUP} "),
            format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}"),
        ]
    );
    running.signal("-TERM");
    assert_eq!(running.wait().await.code(), Some(0));
}

#[tokio::test]
async fn a_user_without_an_entry_in_the_user_database_has_no_home() {
    if !inside("sudo::a_user_without_an_entry_in_the_user_database_has_no_home") {
        return;
    }
    const NOBODY: u32 = 54321;
    let cluster = FakeCluster::start().await.unwrap();
    let homes = Homes::new();
    let kubeconfig = homes.write("kubeconfig", &homes.plugin(&cluster));
    // This user may use what is in the other one's home.
    for path in ["", "kubeconfig", "plugin"] {
        chown(homes.user.path().join(path), Some(NOBODY), Some(GID)).unwrap();
    }
    let (running, log) = start(homes.sudo(NOBODY, &[]).env("KUBECONFIG", kubeconfig)).await;
    assert_eq!(
        homes.note(),
        format!("{NOBODY}\n{NOBODY}\n{GID}\n{GID}\n/\n{NOBODY}\n")
    );
    assert!(
        log.seen
            .iter()
            .any(|line| line.contains("there is no home folder")),
        "{:#?}",
        log.seen
    );
    assert_eq!(
        statuses(running.0.id(), &["Uid:", "Groups:"]),
        [
            format!("Groups:\t{GID} "),
            format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}")
        ]
    );
}

#[tokio::test]
async fn doas_is_heard_too() {
    if !inside("sudo::doas_is_heard_too") {
        return;
    }
    let cluster = FakeCluster::start().await.unwrap();
    let homes = Homes::new();
    homes.write(".kube/config", &cluster.kubeconfig());
    let mut command = program(&[]);
    let (running, _log) = start(command.env("HOME", homes.root.path()).env("DOAS_USER", "alice")).await;
    assert_eq!(
        statuses(running.0.id(), &["Uid:", "Groups:"]),
        [
            format!("Groups:\t{GID} {SECOND_GROUP} "),
            format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}")
        ]
    );
}

#[tokio::test]
async fn files_that_only_root_may_read_stay_unread() {
    if !inside("sudo::files_that_only_root_may_read_stay_unread") {
        return;
    }
    let cluster = FakeCluster::start().await.unwrap();
    let homes = Homes::new();
    let secret = homes.root.path().join("secret");
    fs::write(&secret, cluster.kubeconfig()).unwrap();
    fs::set_permissions(homes.root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = |done: &Done| {
        let last = done.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("Permission denied"), "{}", done.stderr);
    };
    let path = secret.to_str().unwrap();
    let done = run_command(&mut homes.sudo(UID, &["--kubeconfig", path])).await;
    assert_eq!(done.status, Some(1));
    refused(&done);
    let done = run_command(&mut homes.sudo(UID, &["config", "--config", path])).await;
    assert_eq!(done.status, Some(2));
    refused(&done);
}

#[tokio::test]
async fn root_itself_stays_root_and_an_unclear_user_ends_the_start() {
    if !inside("sudo::root_itself_stays_root_and_an_unclear_user_ends_the_start") {
        return;
    }
    let cluster = FakeCluster::start().await.unwrap();
    let homes = Homes::new();
    fs::create_dir(homes.root.path().join(".kube")).unwrap();
    fs::write(homes.root.path().join(".kube/config"), cluster.kubeconfig()).unwrap();
    let (running, _log) = start(&mut homes.sudo(0, &[])).await;
    assert_eq!(statuses(running.0.id(), &["Uid:"]), ["Uid:\t0\t0\t0\t0"]);
    drop(running);
    for (variable, value) in [("SUDO_UID", "alice"), ("DOAS_USER", "nosuchuser")] {
        let done = run_command(program(&[]).env("HOME", homes.root.path()).env(variable, value)).await;
        assert_eq!(done.status, Some(1), "{}", done.stderr);
        assert!(
            done.stderr
                .contains(&format!("{variable}={value:?} does not name a user")),
            "{}",
            done.stderr
        );
    }
}
