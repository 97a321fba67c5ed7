//! How the demo speaks.

use std::time::Instant;

use anyhow::{Result, bail};

const LONGEST_OUTPUT: usize = 24;

pub(crate) struct Show {
    step: usize,
    claims: std::cell::Cell<usize>,
    start: Instant,
}

impl Show {
    pub(crate) fn begin() -> Self {
        Self { step: 0, claims: 0.into(), start: Instant::now() }
    }

    pub(crate) fn step(&mut self, title: &str, about: &str) {
        self.step += 1;
        println!("\n{}. {title}", self.step);
        println!("   {about}");
    }

    /// A command as it runs on a host, in a unit.
    pub(crate) fn command(&self, host: &str, unit: &str, command: &str) {
        println!("   [{host}, {unit}] $ {command}");
    }

    pub(crate) fn output(&self, text: &str) {
        for line in text.trim_end().lines().take(LONGEST_OUTPUT) {
            println!("     {line}");
        }
    }

    /// Says a claim that holds; one that does not ends the demo with its evidence.
    pub(crate) fn claim(&self, holds: bool, claim: &str, evidence: impl FnOnce() -> String) -> Result<()> {
        if !holds {
            bail!("step {}: not true: {claim}\n{}", self.step, evidence());
        }
        self.claims.set(self.claims.get() + 1);
        println!("   \u{2713} {claim}");
        Ok(())
    }

    pub(crate) fn end(&self) {
        let (claims, seconds) = (self.claims.get(), self.start.elapsed().as_secs_f64());
        println!("\nAll {claims} claims held, in {seconds:.0} s.");
    }
}
