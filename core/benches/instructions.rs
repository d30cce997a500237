//! How many instructions operations take, and a budget for them that `scripts/test` holds. Unlike times, the numbers are
//! the same in every run, on a busy machine too.
//!
//! This program runs itself under callgrind, which counts what is done in [`measured`] and in what that calls, and
//! writes the sum at the end of each call. So the set-up does not count.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::{env, fs};

use operations::{OPERATIONS, Operation, Proxy};
use serde::{Deserialize, Serialize};

/// Operations may take so many hundredths more than in the budget. All runs give the same numbers, whatever keys `ahash`
/// draws; it is for what an unrelated change moves between functions (4 % were seen, one instruction of a short loop), and
/// for other versions of the C library.
const TOLERANCE: f64 = 6.0;
/// When they take so much less than in the budget, it is worth lowering.
const BARGAIN: f64 = 10.0;
/// The C library copies and compares by what the CPU has. This leaves what each x86-64 has, in loops: callgrind counts
/// `rep movsb` once for each byte.
const TUNABLES: &str = "glibc.cpu.hwcaps=-AVX2,-AVX_Fast_Unaligned_Load,-ERMS";

const BUDGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.json");
const UPDATE: &str = "cargo run --release -p keygate-core-bench --bin instructions -- --update";
/// The argument of the run that is counted.
const COUNTED: &str = "--counted";

/// What stands in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    /// Which made the code that was counted: another one makes other code.
    compiler: String,
    /// Instructions of each operation.
    instructions: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    match env::args().nth(1).as_deref() {
        None => check(),
        Some("--update") => update(),
        Some(COUNTED) => {
            be_counted();
            ExitCode::SUCCESS
        }
        Some(other) => fail(&format!("unknown argument '{other}'; there is --update")),
    }
}

fn check() -> ExitCode {
    let file = fs::read(BUDGET).expect("the budget");
    let budget: Budget = serde_json::from_slice(&file).expect("a budget");
    let compiler = compiler();
    if budget.compiler != compiler {
        println!("not counted: the budget is for {}, this is {compiler}", budget.compiler);
        return ExitCode::SUCCESS;
    }
    let counts = match count() {
        Ok(counts) => counts,
        Err(why) => {
            println!("not counted: {why}");
            return ExitCode::SUCCESS;
        }
    };
    let (mut beyond, mut bargains) = (Vec::new(), Vec::new());
    println!("{:<24}{:>12}{:>12}", "", "counted", "budget");
    for (name, counted) in &counts {
        let Some(wanted) = budget.instructions.get(name) else {
            beyond.push(format!("{name} has no budget"));
            continue;
        };
        let more = (*counted as f64 / *wanted as f64 - 1.0) * 100.0;
        println!("{name:<24}{counted:>12}{wanted:>12}{more:>+8.1} %");
        if more > TOLERANCE {
            beyond.push(format!("{name} takes {counted} instructions, {more:.1} % more than its {wanted}"));
        } else if more < -BARGAIN {
            bargains.push(name.as_str());
        }
    }
    for name in budget.instructions.keys().filter(|name| !counts.contains_key(*name)) {
        beyond.push(format!("the budget has {name}, which is no operation"));
    }
    if !bargains.is_empty() {
        println!(
            "much cheaper than in the budget, which can be lowered: {}\n  {UPDATE}",
            bargains.join(", ")
        );
    }
    if beyond.is_empty() {
        return ExitCode::SUCCESS;
    }
    fail(&format!(
        "the budget of instructions does not hold ({TOLERANCE} % are tolerated):\n  {}\n\
         if that is meant, say why in the commit, which has the new budget:\n  {UPDATE}",
        beyond.join("\n  ")
    ))
}

fn update() -> ExitCode {
    let instructions = match count() {
        Ok(counts) => counts,
        Err(why) => return fail(&why),
    };
    let budget = Budget { compiler: compiler(), instructions };
    let text = serde_json::to_string_pretty(&budget).expect("strings and numbers");
    fs::write(BUDGET, text + "\n").expect("the budget's file");
    println!("written to {BUDGET}");
    ExitCode::SUCCESS
}

fn fail(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::FAILURE
}

/// The version that builds here, without its build's date.
fn compiler() -> String {
    let output = Command::new("rustc").arg("--version").output().expect("rustc");
    let version = String::from_utf8(output.stdout).expect("a version");
    version.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Instructions of each operation, or why they cannot be counted here.
fn count() -> Result<BTreeMap<String, u64>, String> {
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))) {
        return Err("the budget is for x86-64, Linux and its usual C library".into());
    }
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Err("valgrind is not installed".into());
    }
    let program = env::current_exe().expect("this program");
    let sums = program.with_extension("callgrind");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=instructions::measured"])
        .arg("--dump-after=instructions::measured")
        .arg(format!("--callgrind-out-file={}", sums.display()))
        .arg(&program)
        .arg(COUNTED)
        .env("GLIBC_TUNABLES", TUNABLES)
        .output()
        .expect("valgrind");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What was left at the end: nothing.
    fs::remove_file(&sums).expect("the last file of callgrind");
    let counts = (1..).zip(&OPERATIONS).map(|(number, operation)| {
        let total = take_sum(&sums.with_extension(format!("callgrind.{number}")));
        (operation.name.to_owned(), total / u64::from(operation.times))
    });
    Ok(counts.collect())
}

/// Reads what callgrind wrote at the end of one call, and removes it.
fn take_sum(file: &Path) -> u64 {
    let text = fs::read_to_string(file).expect("a file of callgrind for each operation");
    fs::remove_file(file).expect("that file");
    let sum = text.lines().find_map(|line| line.strip_prefix("summary: "));
    sum.expect("a sum").parse().expect("a number")
}

fn be_counted() {
    let mut proxy = Proxy::default();
    for operation in &OPERATIONS {
        // What is done once, such as to remember a token, is done before.
        (operation.run)(&mut proxy);
        measured(operation, &mut proxy);
    }
}

/// Callgrind knows it by its name.
#[inline(never)]
fn measured(operation: &Operation, proxy: &mut Proxy) {
    for _ in 0..operation.times {
        (operation.run)(proxy);
    }
}
