use super::settings::{Default, RENAMED, SETTINGS};
use super::*;
use crate::model::canary::Alert;

#[test]
fn nothing_typed_is_valid() {
    let config = read("", &[]).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(config.admin_key_file.to_str(), Some(".keygate/data/admin.key"));
    assert_eq!(config.roles.len(), 4);
    assert_eq!(config.personal_data, PersonalData::Sealed);
}

#[test]
fn later_sources_win() {
    let file = "listen = \"127.0.0.1:1\"\n[tokens]\nissuer = \"a\"\n[journal]\npersonal_data = \"plain\"";
    let overrides = [
        ("listen", "127.0.0.1:2".to_owned(), "KEYGATE_LISTEN".to_owned()),
        ("listen", "127.0.0.1:3".to_owned(), "--listen".to_owned()),
    ];
    let config = read(file, &overrides).unwrap();
    assert_eq!((config.listen.port(), config.issuer.as_str()), (3, "a"));
    assert_eq!(config.personal_data, PersonalData::Plain);
}

#[test]
fn every_error_is_reported_at_once_and_unknown_settings_are_named() {
    let file = r#"
        listen = "nowhere"
        sync_listn = "127.0.0.1:1"
        [tokens]
        leeway = "2h"
        isuer = "x"
        [secrets]
        algorithm = "none"
        schedule = "quarterly"
        overlap = "0s"
        retire = "never"
        [hsm]
        module = "/usr/lib/softhsm/libsofthsm2.so"
        signing = "yes"
        [fleet]
        max_staleness = 300
        [limits]
        url = "https://keygate-0:8001"
        [emergency]
        second_approval_threshold = 25
        [journal]
        personal_data = "dropped"
        [roles.basic]
        ttl = "1s"
        requests_per_hour = -2
        [roles.robot]
        may_create = ["nobody"]
    "#;
    let errors = read(file, &[("log.format", "xml".into(), "KEYGATE_LOG_FORMAT".into())]).unwrap_err().0;
    for start in [
        "listen: \"nowhere\" is not an address",
        "tokens.leeway: must be whole seconds, at most 60s",
        "limits.url: is not a URL such as \"http://",
        "secrets.algorithm: \"none\" is none of",
        "secrets.schedule: \"quarterly\" is not a cron expression",
        "secrets.overlap: must be whole seconds from 1s",
        "secrets.retire: \"never\" is neither",
        "hsm.signing: \"yes\" is neither true nor false",
        "hsm: both hsm.module and hsm.token are needed",
        "fleet.max_staleness: 300 is not a text",
        "emergency.second_approval_threshold: 25 is not a share",
        "journal.personal_data: \"dropped\" is neither \"sealed\" nor \"plain\"",
        "log.format: \"xml\" is neither \"text\" nor \"json\" (from KEYGATE_LOG_FORMAT)",
        "roles.basic.ttl: must be from 1m",
        "roles.basic.requests_per_hour: must be -1",
        "roles.robot: a new role needs",
        "roles.robot.may_create: there is no role \"nobody\"",
        "sync_listn: no such setting",
        "tokens.isuer: no such setting",
    ] {
        assert!(errors.iter().any(|error| error.starts_with(start)), "{start}\n{errors:#?}");
    }
    assert_eq!(errors.len(), 19, "{errors:#?}");
}

#[test]
fn a_canarys_alert_is_so_many_failures_of_so_many() {
    let typed = |toml: &str| read(&format!("[canary]\n{toml}"), &[]).map(|config| config.canary.alert);
    let of = |failures, of| Alert { failures, of };
    assert_eq!(typed("").unwrap(), of(3, 3));
    assert_eq!(typed("alert = { failures = 3, window = 5 }").unwrap(), of(3, 5));
    assert_eq!(typed("alert.failures = 2").unwrap(), of(2, 2));
    assert_eq!(typed("alert.window = 4").unwrap(), of(3, 4));
    let variable = ("canary.alert.window", "9".to_owned(), "KEYGATE_CANARY_ALERT_WINDOW".to_owned());
    assert_eq!(read("", &[variable]).unwrap().canary.alert, of(3, 9));
    for wrong in
        ["alert.window = 2", "alert.failures = 0", "alert = { failures = 3, window = 101 }", "alert = 3"]
    {
        assert!(typed(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_share_is_a_number_from_0_to_1() {
    let typed = |value: &str| {
        read(&format!("[emergency]\nsecond_approval_threshold = {value}"), &[])
            .map(|config| config.second_approval_threshold)
    };
    for (value, share) in [("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("\"0.25\"", 0.25)] {
        assert_eq!(typed(value).unwrap(), Some(share), "{value}");
    }
    for value in ["-0.1", "1.1", "2", "nan", "inf", "\"NaN\"", "\"25%\"", "\"\"", "true"] {
        assert!(typed(value).is_err(), "{value}");
    }
    assert_eq!(read("", &[]).unwrap().second_approval_threshold, None);
}

#[test]
fn a_role_is_changed_member_by_member() {
    let config =
        read("[roles.basic]\nttl = \"1d\"\n[roles.robot]\nttl = \"1h\"\nscopes = [\"x\"]", &[]).unwrap();
    assert_eq!(config.roles["basic"].ttl, Duration::from_secs(86_400));
    assert_eq!(config.roles["basic"].scopes, ["chat:read", "chat:write"]);
    assert_eq!(config.roles["robot"].requests_per_hour, None);
    assert!(config.roles["admin"].may_create.contains(&"robot".to_owned()));
    assert!(config.roles["admin"].scopes.contains(&"x".to_owned()));
}

#[test]
fn each_default_stands_in_the_table_and_each_setting_is_read() {
    for setting in SETTINGS {
        // A default is what it would be if it were typed.
        if let Default::Value(default) = setting.default {
            let typed = [(setting.key, default.to_owned(), "a test".to_owned())];
            let (typed, untyped) = (read("", &typed).unwrap(), read("", &[]).unwrap());
            assert_eq!(format!("{typed:?}"), format!("{untyped:?}"), "{}", setting.key);
        }
        let wrong = [(setting.key, "\u{7f}".to_owned(), "a test".to_owned())];
        if let Err(ConfigErrors(errors)) = read("", &wrong) {
            assert!(!errors.iter().any(|error| error.contains("no such setting")), "{errors:?}");
        }
    }
}

#[test]
fn a_former_name_is_refused_with_the_new_one() {
    for (old, new) in RENAMED.into_iter().chain([("roles.basic.life", "roles.basic.ttl")]) {
        let typed = [(old, "1".to_owned(), "a variable".to_owned())];
        let errors = read("", &typed).unwrap_err().0;
        assert_eq!(errors, [format!("{old}: is called {new} now (from a variable)")]);
    }
}
