//! The one connection that writes to the SQLite file. Transactions that come while another waits for the disk are made
//! durable by one sync: each is a savepoint in the same transaction of SQLite, and nobody is told that it is written
//! before all of it is.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rusqlite::Connection;

use super::DbError;

/// How many may begin in one transaction of SQLite, whether they are given up or not: nobody waits for more than so many.
/// As many as hosts are answered at once.
const MOST_TOGETHER: usize = 16;

pub(super) struct Writer {
    group: Mutex<Group>,
    /// Somebody may have to write the group, or it is written.
    changed: Condvar,
    /// Those who wait to begin; the group is written when there are none.
    queued: AtomicUsize,
}

/// Transactions that are written together, or not at all.
struct Group {
    connection: Connection,
    /// How many began.
    begun: usize,
    /// How many are done and wait to be written.
    members: usize,
    outcome: Outcome,
}

/// Of one group, once it is known.
type Outcome = Arc<OnceLock<Result<(), String>>>;

impl Writer {
    pub(super) fn new(connection: Connection) -> Writer {
        let group = Group { connection, begun: 0, members: 0, outcome: Outcome::default() };
        Writer { group: Mutex::new(group), changed: Condvar::new(), queued: AtomicUsize::new(0) }
    }

    pub(super) fn begin(&self) -> Result<Writing<'_>, DbError> {
        self.queued.fetch_add(1, Ordering::SeqCst);
        let mut group = self.lock();
        self.queued.fetch_sub(1, Ordering::SeqCst);
        group.notice_rollback(self);
        if group.members > 0 && group.begun >= MOST_TOGETHER {
            // Its members are told; who begins now has no part in it.
            _ = group.write(self);
        }
        if group.members == 0 {
            group.begun = 0;
        }
        group.begun += 1;
        let begun = match group.members {
            // The write lock from the start: what is read stays true until the commit.
            0 => group.connection.execute_batch("BEGIN IMMEDIATE"),
            _ => group.savepoint("SAVEPOINT one"),
        };
        if let Err(error) = begun {
            self.changed.notify_all();
            return Err(error.into());
        }
        Ok(Writing { writer: self, group: Some(group) })
    }

    pub(super) fn into_connection(self) -> Connection {
        self.group.into_inner().unwrap_or_else(PoisonError::into_inner).connection
    }

    /// A panic while it was held rolled its transaction back.
    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// SQLite ends the whole transaction when the disk is full or fails: all of its members are lost.
    fn notice_rollback(&mut self, writer: &Writer) {
        if self.members > 0 && self.connection.is_autocommit() {
            self.end(
                Err("an error of the disk undid what was to be written together; look at the disk and its free space"
                    .to_owned()),
                writer,
            );
        }
    }

    fn savepoint(&self, statement: &str) -> rusqlite::Result<()> {
        self.connection.prepare_cached(statement)?.execute([]).map(drop)
    }

    fn end(&mut self, result: Result<(), String>, writer: &Writer) {
        // Only the first end of a group counts, and it is the only one.
        _ = std::mem::take(&mut self.outcome).set(result);
        self.members = 0;
        writer.changed.notify_all();
    }

    fn write(&mut self, writer: &Writer) -> Result<(), DbError> {
        let written = self.connection.execute_batch("COMMIT");
        self.conclude(written, writer)
    }

    fn conclude(&mut self, written: rusqlite::Result<()>, writer: &Writer) -> Result<(), DbError> {
        if written.is_err() && !self.connection.is_autocommit() {
            _ = self.connection.execute_batch("ROLLBACK");
        }
        self.end(written.as_ref().copied().map_err(ToString::to_string), writer);
        Ok(written?)
    }
}

/// A transaction under way; dropping it changes nothing.
pub(super) struct Writing<'a> {
    writer: &'a Writer,
    /// Until it is committed.
    group: Option<MutexGuard<'a, Group>>,
}

impl Writing<'_> {
    pub(super) fn connection(&self) -> &Connection {
        &self.group.as_ref().expect("taken by the commit only, which consumes it").connection
    }

    /// Returns when everything is on the disk. Whoever waits to begin goes first and takes part, for the price of one
    /// sync; the last of them writes for all.
    pub(super) fn commit(mut self) -> Result<(), DbError> {
        let mut group = self.group.take().expect("taken here only");
        if group.members > 0
            && let Err(error) = group.savepoint("RELEASE one")
        {
            // What this one wrote cannot be told from what the others wrote.
            return group.conclude(Err(error), self.writer);
        }
        group.members += 1;
        let outcome = group.outcome.clone();
        loop {
            if let Some(result) = outcome.get() {
                return result.clone().map_err(DbError::Together);
            }
            if group.begun >= MOST_TOGETHER || self.writer.queued.load(Ordering::SeqCst) == 0 {
                return group.write(self.writer);
            }
            group = self.writer.changed.wait(group).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let Some(group) = self.group.as_mut() else { return };
        // Fails only when SQLite has rolled back already, which whoever begins next notices.
        _ = match group.members {
            0 => group.connection.execute_batch("ROLLBACK"),
            _ => group.connection.execute_batch("ROLLBACK TO one; RELEASE one"),
        };
        group.notice_rollback(self.writer);
        // Those it was to take part with may be waiting for it.
        self.writer.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::thread;

    use super::*;

    fn writer() -> (tempfile::TempDir, Writer) {
        let dir = tempfile::tempdir().unwrap();
        let connection = connect(dir.path());
        connection.pragma_update(None, "journal_mode", "WAL").unwrap();
        connection.execute_batch("CREATE TABLE noted (what TEXT NOT NULL)").unwrap();
        (dir, Writer::new(connection))
    }

    fn connect(dir: &Path) -> Connection {
        Connection::open(dir.join("written.db")).unwrap()
    }

    fn noted(dir: &Path) -> Vec<String> {
        let connection = connect(dir);
        let mut query = connection.prepare("SELECT what FROM noted ORDER BY what").unwrap();
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    fn note(writing: &Writing<'_>, what: &str) -> rusqlite::Result<usize> {
        writing.connection().execute("INSERT INTO noted VALUES (?1)", [what])
    }

    /// Two transactions of which the second waits to begin until the first is done; both outcomes.
    fn one_after_the_other(
        writer: &Writer,
        second: impl FnOnce(Writing<'_>) -> Result<(), DbError> + Send,
    ) -> (Result<(), DbError>, Result<(), DbError>) {
        thread::scope(|scope| {
            let first = writer.begin().unwrap();
            let second = scope.spawn(|| second(writer.begin().unwrap()));
            while writer.queued.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            note(&first, "first").unwrap();
            (first.commit(), second.join().unwrap())
        })
    }

    #[test]
    fn a_transaction_is_written_with_the_one_that_waits_to_begin() {
        let (dir, writer) = writer();
        let outcomes = one_after_the_other(&writer, |second| {
            assert!(noted(dir.path()).is_empty(), "the first is not written yet, and its caller not told");
            note(&second, "second").unwrap();
            second.commit()
        });
        assert!(matches!(outcomes, (Ok(()), Ok(()))), "{outcomes:?}");
        assert_eq!(noted(dir.path()), ["first", "second"]);
    }

    #[test]
    fn one_that_is_given_up_takes_nothing_along() {
        let (dir, writer) = writer();
        let outcomes = one_after_the_other(&writer, |second| {
            note(&second, "second").unwrap();
            drop(second);
            Ok(())
        });
        assert!(matches!(outcomes, (Ok(()), Ok(()))), "{outcomes:?}");
        assert_eq!(noted(dir.path()), ["first"]);
        note(&writer.begin().unwrap(), "alone").unwrap();
        assert_eq!(noted(dir.path()), ["first"]);
    }

    #[test]
    fn a_panic_in_one_takes_nothing_along() {
        let (dir, writer) = writer();
        let outcomes = one_after_the_other(&writer, |second| {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                note(&second, "second").unwrap();
                panic!("on purpose");
            }));
            assert!(caught.is_err());
            Ok(())
        });
        assert!(matches!(outcomes, (Ok(()), Ok(()))), "{outcomes:?}");
        assert_eq!(noted(dir.path()), ["first"]);
    }

    #[test]
    fn who_shares_a_transaction_that_the_disk_refused_is_told_so() {
        let (dir, writer) = writer();
        let outcomes = one_after_the_other(&writer, |second| {
            let pages: i64 = second.connection().pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
            second.connection().pragma_update(None, "max_page_count", pages).unwrap();
            note(&second, &"x".repeat(1 << 20))?;
            second.commit()
        });
        let (Err(DbError::Together(_)), Err(DbError::Sqlite(_))) = outcomes else { panic!("{outcomes:?}") };
        assert!(noted(dir.path()).is_empty());

        let next = writer.begin().unwrap();
        note(&next, "next").unwrap();
        next.commit().unwrap();
        assert_eq!(noted(dir.path()), ["next"]);
    }

    #[test]
    fn those_who_give_up_again_and_again_hold_up_nobody() {
        let (dir, writer) = writer();
        let is_written = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            // More than one, so that there is always somebody who waits to begin.
            for _ in 0..4 {
                scope.spawn(|| {
                    while !is_written.load(Ordering::SeqCst) {
                        drop(writer.begin().unwrap());
                    }
                });
            }
            let writing = writer.begin().unwrap();
            note(&writing, "kept").unwrap();
            writing.commit().unwrap();
            is_written.store(true, Ordering::SeqCst);
        });
        assert_eq!(noted(dir.path()), ["kept"]);
    }

    #[test]
    fn many_threads_write_everything_they_were_told_is_written() {
        let (dir, writer) = writer();
        thread::scope(|scope| {
            for thread in 0..8 {
                let (writer, dir) = (&writer, dir.path());
                scope.spawn(move || {
                    for round in 0..20 {
                        let what = format!("{thread}.{round}");
                        let writing = writer.begin().unwrap();
                        note(&writing, &what).unwrap();
                        if round % 5 == 4 {
                            drop(writing);
                            continue;
                        }
                        writing.commit().unwrap();
                        assert!(noted(dir).contains(&what));
                    }
                });
            }
        });
        assert_eq!(noted(dir.path()).len(), 8 * 16);
    }
}
