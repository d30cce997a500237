//! The control plane's connection to Redis, against real ones: what it finds, what it calls what goes wrong.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use keygate::config::Target;
use keygate::redis_store::{Link, LinkError, Message, Messages, Timeouts};
use keygate_e2e::ports::Port;
use keygate_e2e::{Cluster, Redis, SOON, Sentinels, wait_until};
use redis::{Cmd, Script, Value, cmd};

fn target(url: &str) -> Target {
    url.parse().unwrap_or_else(|error| panic!("{error}"))
}

async fn connect(url: &str) -> Link {
    match target(url).connect(Timeouts::default()).await {
        Ok(link) => link,
        Err(error) => panic!("{error}: {error:?}"),
    }
}

async fn refused(url: &str) -> LinkError {
    target(url).connect(Timeouts::default()).await.expect_err("it cannot be connected to")
}

fn command(words: &[&str]) -> Cmd {
    let mut command = cmd(words[0]);
    command.arg(&words[1..]);
    command
}

async fn query(link: &Link, words: &[&str]) -> Result<Value, LinkError> {
    link.query(&command(words)).await
}

/// Its label, and whether the link is of no use any more.
#[track_caller]
fn why(answer: Result<Value, LinkError>) -> (&'static str, bool) {
    let error = answer.expect_err("it is refused");
    (error.label(), error.must_reconnect())
}

async fn get(link: &Link, key: &str) -> Option<String> {
    link.query(&command(&["GET", key])).await.expect("an answer")
}

async fn next(messages: &mut Messages) -> Option<Message> {
    tokio::time::timeout(SOON, messages.next()).await.expect("a message or the end")
}

async fn scanned(link: &Link, pattern: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    link.scan(pattern, &mut |keys| found.extend(keys)).await.expect("all keys");
    found
}

fn names(count: usize) -> BTreeSet<String> {
    (0..count).map(|number| format!("revoked:{number}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_used_with_a_password_a_user_and_a_database() {
    let mut redis = Redis::new().with_password("p@ss/word").with_acl("keygate", "hunter2", "~* &* +@all");
    redis.run();
    let link = connect(&format!("redis://:p%40ss%2Fword@127.0.0.1:{}/3", redis.port())).await;
    query(&link, &["SET", "key", "value"]).await.expect("it is set");
    assert_eq!(redis.cli(&["-n", "3", "GET", "key"]), "value");
    assert!(redis.cli(&["CLIENT", "LIST"]).contains("db=3"));

    let link = connect(&redis.url_as("keygate:hunter2")).await;
    assert_eq!(link.query::<String>(&cmd("ACL").arg("WHOAMI").clone()).await.expect("a name"), "keygate");
    assert!(!link.is_cluster());

    for login in ["", ":wrong", "keygate:wrong", "nobody:hunter2"] {
        // Without a password one is let in and may do nothing.
        let error = match target(&redis.url_as(login)).connect(Timeouts::default()).await {
            Ok(link) => query(&link, &["GET", "key"]).await.expect_err("no answer"),
            Err(error) => error,
        };
        assert_eq!((error.label(), error.must_reconnect()), ("auth", true), "{login}: {error:?}");
        let said = format!("{error} {error:?} {:?}", target(&redis.url_as(login)));
        assert!(!said.contains("wrong") && !said.contains("hunter2"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_not_is_told_apart() {
    let mut redis = Redis::new().with_acl("reader", "pw", "~revoked:* &* +@all -@write");
    redis.run();
    let link = connect(&redis.url_as("reader:pw")).await;
    query(&link, &["GET", "revoked:a"]).await.expect("it may read");
    assert_eq!(why(query(&link, &["SET", "revoked:a", "1"]).await), ("auth", true));
    assert_eq!(why(query(&link, &["GET", "other"]).await), ("auth", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_by_the_root_that_is_named() {
    let mut redis = Redis::new().with_password("pw").with_tls();
    redis.run();
    let link = connect(&redis.url()).await;
    query(&link, &["SET", "key", "value"]).await.expect("it is set");
    assert_eq!(redis.cli(&["GET", "key"]), "value");
    let mut messages =
        target(&redis.url()).listen(Timeouts::default(), &["hints"]).await.expect("it listens");
    redis.cli(&["PUBLISH", "hints", "now"]);
    assert_eq!(next(&mut messages).await.expect("a message").payload, b"now");

    // Roots of browsers, another's root, no root, and no TLS at all.
    let bare = format!("rediss://:pw@127.0.0.1:{}", redis.port());
    assert_eq!(refused(&bare).await.label(), "unreachable");
    let other = Redis::new().with_tls();
    assert_eq!(refused(&format!("{bare}?ca={}", other.ca().display())).await.label(), "unreachable");
    assert_eq!(refused(&format!("{bare}?ca=/nowhere")).await.label(), "ca");
    assert_eq!(refused(&format!("{bare}?ca={}", redis.log().display())).await.label(), "ca");
    assert_eq!(refused(&bare.replace("rediss", "redis")).await.label(), "unreachable");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_command_of_a_pipeline_has_an_answer_of_its_own() {
    let redis = Redis::start();
    let link = connect(&redis.url()).await;
    let commands =
        [&["SET", "a", "1"][..], &["SADD", "a", "x"], &["INCR", "a"], &["NOSUCHCOMMAND"]].map(command);
    // On a task of its own, as the writer of the store has it.
    let other = link.clone();
    let answers = tokio::spawn(async move { other.pipeline(&commands).await });
    let answers = answers.await.expect("it ends").expect("answers");
    assert_eq!(answers.len(), 4);
    assert!(matches!(answers[0], Ok(Value::Okay)), "{answers:?}");
    assert!(matches!(answers[1], Err(LinkError::WrongType)), "{answers:?}");
    assert!(matches!(answers[2], Ok(Value::Int(2))), "{answers:?}");
    assert_eq!(answers[3].as_ref().map_err(LinkError::label), Err("other"));
    assert!(link.pipeline(&[]).await.expect("nothing to do").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_runs_also_after_redis_has_forgotten_it() {
    let redis = Redis::start();
    let link = connect(&redis.url()).await;
    let script = Script::new("return redis.call('INCRBY', KEYS[1], ARGV[1])");
    let mut call = script.prepare_invoke();
    call.key("a").arg(3);
    assert_eq!(link.script::<i64>(&call).await.expect("it runs"), 3);
    redis.cli(&["SCRIPT", "FLUSH"]);
    assert_eq!(link.script::<i64>(&call).await.expect("it runs"), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_finds_all_keys_that_match() {
    let redis = Redis::start();
    let link = connect(&redis.url()).await;
    let keys = names(5000);
    let commands: Vec<Cmd> = keys.iter().map(|key| command(&["SET", key, "1"])).collect();
    assert!(link.pipeline(&commands).await.expect("answers").iter().all(Result::is_ok));
    query(&link, &["SET", "other", "1"]).await.expect("it is set");
    link.query::<()>(&cmd("SET").arg(&b"revoked:\xff"[..]).arg("1").clone()).await.expect("it is set");
    assert_eq!(scanned(&link, "revoked:*").await, keys);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_heard_until_the_server_goes() {
    let mut redis = Redis::new().with_config(&[("notify-keyspace-events", "K$gx")]);
    redis.run();
    let channels = ["key_revoked", "__keyspace@0__:emergency_revocation"];
    let mut messages = target(&redis.url()).listen(Timeouts::default(), &channels).await.expect("it listens");
    redis.cli(&["PUBLISH", "other", "no"]);
    redis.cli(&["PUBLISH", "key_revoked", "jti"]);
    redis.cli(&["SET", "emergency_revocation", "{}"]);
    for (channel, payload) in [(channels[0], "jti"), (channels[1], "set")] {
        let wanted = Message { channel: channel.to_owned(), payload: payload.into() };
        assert_eq!(next(&mut messages).await, Some(wanted));
    }
    redis.kill();
    assert_eq!(next(&mut messages).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_to_a_server_that_went_stays_dead_and_a_new_one_is_fine() {
    let mut redis = Redis::start();
    let link = connect(&redis.url()).await;
    redis.kill();
    assert_eq!(why(query(&link, &["GET", "a"]).await), ("unreachable", true));
    assert_eq!(refused(&redis.url()).await.label(), "unreachable");
    redis.run();
    assert_eq!(why(query(&link, &["GET", "a"]).await), ("unreachable", true));
    assert_eq!(get(&connect(&redis.url()).await, "a").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_costs_no_more_than_the_timeout() {
    let redis = Redis::start();
    let link = connect(&redis.url()).await;
    redis.pause();
    let began = Instant::now();
    assert_eq!(why(query(&link, &["GET", "a"]).await), ("unreachable", true));
    assert!(began.elapsed() >= Timeouts::default().response);
    let answers = link.pipeline(&[command(&["GET", "a"])]).await.map(|_| Value::Nil);
    assert_eq!(why(answers), ("unreachable", true));
    assert_eq!(refused(&redis.url()).await.label(), "unreachable");
    let listening = target(&redis.url()).listen(Timeouts::default(), &["a"]).await.map(|_| Value::Nil);
    assert_eq!(why(listening), ("unreachable", true));
    // 0.5 + 0.5 + 1 + 1.5 s, and a busy machine.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_not_a_master() {
    let master = Redis::start();
    let mut replica = Redis::new().replica_of(&master);
    replica.run();
    let link = connect(&replica.url()).await;
    assert_eq!(get(&link, "a").await, None);
    assert_eq!(why(query(&link, &["SET", "a", "1"]).await), ("not_master", true));
    let script = Script::new("return redis.call('SET', KEYS[1], 1)");
    let mut call = script.prepare_invoke();
    call.key("a");
    assert_eq!(why(link.script::<Value>(&call).await), ("not_master", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_refused_for_memory_replicas_and_types_are_told_apart() {
    let redis = Redis::start();
    let link = connect(&redis.url()).await;
    query(&link, &["SADD", "set", "a"]).await.expect("it is added");
    assert_eq!(why(query(&link, &["GET", "set"]).await), ("wrong_type", false));

    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    assert_eq!(why(query(&link, &["SET", "a", "1"]).await), ("no_replicas", false));
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "0"]);

    redis.cli(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    redis.cli(&["CONFIG", "SET", "maxmemory", "100kb"]);
    assert_eq!(why(query(&link, &["SET", "a", "1"]).await), ("out_of_memory", false));
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    query(&link, &["SET", "a", "1"]).await.expect("the same link is fine again");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_refused_for_the_disk_are_told_apart() {
    let mut redis = Redis::new().with_config(&[("save", "3600 1000")]);
    redis.run();
    let link = connect(&redis.url()).await;
    // A directory in the place of its file: root may write everywhere else.
    std::fs::create_dir(redis.directory().join("dump.rdb")).expect("a directory");
    redis.cli(&["BGSAVE"]);
    wait_until(SOON, "the save to fail", || redis.info("rdb_last_bgsave_status").as_deref() == Some("err"));
    assert_eq!(why(query(&link, &["SET", "a", "1"]).await), ("persistence", false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loads_is_told_apart() {
    let mut redis = Redis::start();
    let link = connect(&redis.url()).await;
    let commands: Vec<Cmd> = names(5000).iter().map(|key| command(&["SET", key, "1"])).collect();
    link.pipeline(&commands).await.expect("answers");
    redis.cli(&["SAVE"]);
    redis.stop();
    // 5000 keys of 1 ms; it answers in between after each KiB, well within the time-out.
    redis =
        redis.with_config(&[("key-load-delay", "1000"), ("loading-process-events-interval-bytes", "1024")]);
    redis.launch();
    wait_until(SOON, "Redis to say that it loads", || {
        let found = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                let link = target(&redis.url()).connect(Timeouts::default()).await?;
                query(&link, &["GET", "revoked:1"]).await
            })
        });
        match found {
            Err(LinkError::Unreachable { .. }) => false,
            answer => {
                assert_eq!(why(answer), ("loading", true));
                true
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn something_else_than_redis_is_not_taken_for_it() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("it is sent");
    });
    let error = refused(&format!("redis://:pw@127.0.0.1:{port}")).await;
    assert!(matches!(error.label(), "other" | "unreachable" | "auth"), "{error:?}");
    server.join().expect("it ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_lead_to_the_master_also_after_a_failover() {
    let mut master = Redis::new().with_password("pw");
    master.run();
    let mut replica = Redis::new().with_password("pw").replica_of(&master);
    replica.run();
    let mut sentinels = Sentinels::start(&master, 3, 2);
    let url = sentinels.url();
    let link = connect(&url).await;
    assert_eq!(link.address(), format!("127.0.0.1:{}", master.port()));
    query(&link, &["SET", "a", "1"]).await.expect("it is set");
    let mut messages = target(&url).listen(Timeouts::default(), &["hints"]).await.expect("it listens");

    // The first Sentinel that is asked is gone, and so is the master.
    sentinels.kill(0);
    master.kill();
    assert_eq!(why(query(&link, &["SET", "a", "2"]).await), ("unreachable", true));
    assert_eq!(next(&mut messages).await, None);
    sentinels.wait_for_master(replica.port());
    let link = connect(&url).await;
    assert_eq!(link.address(), format!("127.0.0.1:{}", replica.port()));
    query(&link, &["SET", "a", "3"]).await.expect("it is set");

    assert_eq!(refused(&url.replace("mymaster", "other")).await.label(), "unknown_master");
    sentinels.kill(1);
    sentinels.kill(2);
    assert_eq!(refused(&url).await.label(), "unreachable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_was_made_a_replica_is_left_though_its_connection_stays() {
    let master = Redis::start();
    let mut replica = Redis::new().replica_of(&master);
    replica.run();
    let sentinels = Sentinels::start(&master, 1, 1);
    let link = connect(&sentinels.url()).await;
    // By hand, so that the Sentinel does not close connections, and still names the old one.
    replica.cli(&["REPLICAOF", "NO", "ONE"]);
    master.cli(&["REPLICAOF", "127.0.0.1", &replica.port().to_string()]);
    assert_eq!(why(query(&link, &["SET", "a", "1"]).await), ("not_master", true));
    assert_eq!(refused(&sentinels.url()).await.label(), "not_master");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_used_as_one_store() {
    let mut cluster = Cluster::start(3);
    let link = connect(&cluster.url()).await;
    assert!(link.is_cluster());
    let keys = names(300);
    // Of one key in order, and each answer in its place.
    let mut commands = Vec::new();
    for key in &keys {
        commands.extend([&["SET", key, "wrong"][..], &["INCR", key], &["SET", key, key]].map(command));
    }
    let answers = link.pipeline(&commands).await.expect("answers");
    assert_eq!(answers.len(), 900);
    for answers in answers.chunks(3) {
        assert!(
            matches!(answers, [Ok(Value::Okay), Err(LinkError::Other { .. }), Ok(Value::Okay)]),
            "{answers:?}"
        );
    }
    for key in &keys {
        assert_eq!(get(&link, key).await.as_ref(), Some(key));
    }
    assert_eq!(cluster.cli(&["GET", "revoked:7"]), "revoked:7");
    assert_eq!(scanned(&link, "revoked:*").await, keys);

    // To no replicas, of each master the least.
    assert_eq!(link.query::<i64>(&command(&["WAIT", "0", "100"])).await.expect("a number"), 0);

    let masters = link.masters().await.expect("all masters");
    assert_eq!(masters.len(), 3);
    let mut sizes = Vec::new();
    for master in &masters {
        assert!(!master.is_cluster());
        sizes.push(master.query::<u64>(&cmd("DBSIZE")).await.expect("a number"));
    }
    assert!(sizes.iter().sum::<u64>() == 300 && sizes.iter().all(|size| *size > 0), "{sizes:?}");

    let script = Script::new("return redis.call('GET', KEYS[1])");
    for key in ["revoked:1", "revoked:2", "revoked:3"] {
        let mut call = script.prepare_invoke();
        call.key(key);
        assert_eq!(link.script::<String>(&call).await.expect("it runs"), key);
    }

    // A key's notification stays on its master; what is published comes from each.
    for node in cluster.nodes() {
        node.cli(&["CONFIG", "SET", "notify-keyspace-events", "K$"]);
    }
    let names: Vec<String> = (0..6).map(|number| format!("__keyspace@0__:revoked:{number}")).collect();
    let channels: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut messages =
        target(&cluster.url()).listen(Timeouts::default(), &channels).await.expect("it listens");
    let mut heard = BTreeSet::new();
    for number in 0..6 {
        cluster.cli(&["SET", &format!("revoked:{number}"), "x"]);
        heard.insert(next(&mut messages).await.expect("a message").channel);
    }
    assert_eq!(heard, names.iter().cloned().collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_lost_a_master_is_down_and_not_half_there() {
    let mut cluster = Cluster::start(3);
    let url = cluster.url();
    let link = connect(&url).await;
    cluster.nodes()[2].kill();
    // Some keys are on the node that is gone; soon the others refuse theirs too.
    wait_until(SOON, "the Cluster to be down", || {
        cluster.nodes()[0].cli(&["CLUSTER", "INFO"]).contains("cluster_state:fail")
    });
    for key in ["revoked:0", "revoked:1", "revoked:2", "revoked:3"] {
        let (label, must_reconnect) = why(query(&link, &["SET", key, "1"]).await);
        assert!(must_reconnect && matches!(label, "cluster_down" | "unreachable"), "{label}");
    }
    assert!(link.masters().await.is_err());
    assert!(link.scan("*", &mut |_| ()).await.is_err());

    cluster.nodes()[2].run();
    cluster.wait_ready();
    let link = connect(&url).await;
    query(&link, &["SET", "revoked:0", "1"]).await.expect("it is set");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_for_a_server_and_a_server_for_a_cluster_are_told_apart() {
    let redis = Redis::start();
    let url = redis.url().replace("redis://", "redis+cluster://");
    assert_eq!(refused(&url).await.label(), "no_cluster");
    let bus = Port::reserve();
    let mut node =
        Redis::new().with_config(&[("cluster-enabled", "yes"), ("cluster-port", &bus.number().to_string())]);
    node.run();
    // It serves no slots yet.
    let url = node.url().replace("redis://", "redis+cluster://");
    assert_eq!(refused(&url).await.label(), "cluster_down");
    let link = connect(&node.url()).await;
    assert_eq!(why(query(&link, &["GET", "a"]).await), ("cluster_down", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_with_a_password_is_let_into() {
    let cluster = Cluster::start_with(3, |node| node.with_password("pw"));
    let link = connect(&cluster.url()).await;
    query(&link, &["SET", "revoked:0", "1"]).await.expect("it is set");
    assert_eq!(refused(&cluster.url().replace(":pw@", ":no@")).await.label(), "auth");
}
