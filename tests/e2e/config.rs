//! How the control plane starts, refuses to, and stops.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use keygate_e2e::{Request, Stack, binaries};

/// Runs the control plane with a configuration; it is to refuse, at once.
fn refused(stack: &Stack, toml: &str, prepare: impl FnOnce(&mut Command)) -> String {
    fs::write(stack.control_plane.config_file(), toml).expect("the configuration");
    let mut command = Command::new(binaries::keygate());
    stack.control_plane.arguments(&mut command);
    prepare(&mut command);
    // `timeout`, since what should refuse but starts would run for ever.
    let mut timed = Command::new("timeout");
    timed.arg("10").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        timed.env(name, value.unwrap_or_default());
    }
    let Output { status, stderr, .. } = timed.output().expect("it runs");
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success(), "it started:\n{said}");
    assert_ne!(status.code(), Some(124), "it started:\n{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn a_bad_configuration_is_refused_with_every_error_at_once() {
    let stack = Stack::builder().without_control_plane().without_envoy().start();
    let toml = r#"
        listne = "127.0.0.1:8000"

        [tokens]
        issuer = "two words"

        [secrets]
        algorithm = "RS999"
        colour = "red"

        [roles.basic]
        ttl = "soon"
        requests_per_hour = "many"

        [roles.nobody]
        ttl = "7 days ago"
    "#;
    let said = refused(&stack, toml, |_| {});
    for error in [
        "listne",
        "tokens.issuer",
        "secrets.algorithm",
        "secrets.colour",
        "roles.basic.ttl",
        "roles.nobody.ttl",
    ] {
        assert!(said.contains(error), "{error} is not named:\n{said}");
    }
    assert!(
        said.contains("RS999") && said.contains("ES256"),
        "what is wrong, and what would be right:\n{said}"
    );
    assert!(!stack.control_plane.data().exists(), "nothing is made before the configuration is good");
}

#[test]
fn flags_and_environment_are_checked_as_the_file_is() {
    let stack = Stack::builder().without_control_plane().without_envoy().start();
    let said = refused(&stack, "unknown = 1", |command| {
        command.env("KEYGATE_LOG_FORMAT", "xml");
    });
    assert!(said.contains("unknown"), "{said}");
    assert!(said.contains("KEYGATE_LOG_FORMAT"), "where it came from: {said}");
    let said = refused(&stack, "", |command| {
        command.env("KEYGATE_FLEET_HARD_AGE", "1m");
    });
    assert!(said.contains("fleet.hard_age: is called fleet.max_staleness now"), "{said}");
    assert!(said.contains("KEYGATE_FLEET_HARD_AGE"), "{said}");
    let said = refused(&stack, "", |command| {
        command.arg("--no-such-flag");
    });
    assert!(said.contains("--no-such-flag"), "{said}");
    let said = refused(&stack, "this is [not TOML", |_| {});
    assert!(said.contains("keygate.toml"), "the file is named:\n{said}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let stack = Stack::builder().without_control_plane().without_envoy().start();
    let _taken =
        std::net::TcpListener::bind(("127.0.0.1", stack.control_plane.api_port())).expect("the port");
    let said = refused(&stack, "", |_| {});
    assert!(said.contains(&stack.control_plane.api_port().to_string()), "{said}");
}

#[test]
fn a_data_directory_has_one_control_plane() {
    let stack = Stack::builder().without_envoy().start();
    let mut command = Command::new("timeout");
    let output = command
        .arg("10")
        .arg(binaries::keygate())
        .args(["serve", "--listen", "127.0.0.1:0", "--sync-listen", "127.0.0.1:0", "--data-dir"])
        .arg(stack.control_plane.data())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.status.code() != Some(124), "a second one started:\n{said}");
    assert!(said.contains("data"), "{said}");
    stack.api().get("/api/admin/fleet").expect(200);
}

#[test]
fn secrets_are_written_once_and_for_the_owner_alone() {
    let mut stack = Stack::builder().without_envoy().start();
    let files = [stack.control_plane.admin_key_file(), stack.control_plane.fleet_token_file()];
    let read = |path: &Path| fs::read_to_string(path).expect("the file");
    let before: Vec<String> = files.iter().map(|path| read(path)).collect();
    for path in &files {
        let mode = fs::metadata(path).expect("the file").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", path.display());
    }
    stack.control_plane.stop();
    stack.control_plane.start();
    let after: Vec<String> = files.iter().map(|path| read(path)).collect();
    assert!(before == after, "a restart changed the secrets");
    stack.api().get("/api/admin/keys").expect(200);

    // Everything that the control plane keeps is its own.
    for entry in fs::read_dir(stack.control_plane.data()).expect("the data") {
        let entry = entry.expect("an entry");
        let mode = entry.metadata().expect("its mode").permissions().mode();
        assert_eq!(mode & 0o007, 0, "{} is open to others", entry.path().display());
    }
}

#[test]
fn it_stops_when_asked_to_also_while_a_proxy_polls_and_a_client_lingers() {
    let mut stack = Stack::start();
    let mut lingering = keygate_e2e::Connection::open(stack.control_plane.api_port()).expect("a connection");
    lingering.send(&Request::get("/livez")).expect(200);
    let begun = Instant::now();
    let status = stack.control_plane.stop();
    assert!(status.success(), "{status}");
    assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
    let log = fs::read_to_string(stack.control_plane.log()).expect("the log");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_misspelt_variable_is_refused_with_the_right_name() {
    let stack = Stack::builder().without_control_plane().without_envoy().start();
    let said = refused(&stack, "", |command| {
        command.env("KEYGATE_FLEET_MAXSTALENESS", "3s").env("KEYGATE_DASHBOARD", "1");
    });
    assert!(said.contains("KEYGATE_FLEET_MAXSTALENESS"), "{said}");
    assert!(said.contains("KEYGATE_FLEET_MAX_STALENESS?"), "{said}");
    assert!(said.contains("warning: KEYGATE_DASHBOARD is no setting"), "{said}");
}

#[test]
fn each_setting_is_shown_with_where_it_comes_from() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keygate.toml");
    std::fs::write(&file, "[tokens]\nissuer = \"acme\"\n[roles.basic]\nttl = \"3d\"\n").expect("written");
    let mut command = Command::new(binaries::keygate());
    command.current_dir(directory.path()).args(["config", "show"]).env_remove("KEYGATE_CONFIG");
    command
        .env("KEYGATE_REDIS_URL", "redis://user:a-password@localhost:6379")
        .env("KEYGATE_ROLLOUT_GUARD_MARGIN", "0.1");
    let output = command.output().expect("keygate runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let words = |key: &str| {
        let line = text
            .lines()
            .find(|line| line.split(' ').next() == Some(key))
            .unwrap_or_else(|| panic!("{key}: {text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(text.starts_with("keygate.toml\n"), "{text}");
    for wanted in [
        "tokens.issuer acme the configuration file",
        "roles.basic.ttl 3d the configuration file",
        "rollout.guard.margin 0.1 KEYGATE_ROLLOUT_GUARD_MARGIN",
        "rollout.guard.on_breach previous default",
        "redis.url redis://user:…@localhost:6379 KEYGATE_REDIS_URL",
        "policy_file - not set",
    ] {
        assert_eq!(words(wanted.split(' ').next().expect("a key")), wanted);
    }
    assert!(!text.contains("a-password"), "{text}");
    std::fs::write(&file, "[tokens]\nissue = \"acme\"\n").expect("written");
    let output = command.output().expect("keygate runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("tokens.issue: no such setting"), "{said}");
}
