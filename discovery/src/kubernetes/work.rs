//! What is under way beside the loop of `follow.rs`, which hears of it here: a probe, lists, watches. Ends with the
//! connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};

use super::error::Error;
use super::lists::{Lists, Plan};
use super::objects::{Event, Kind, Listed};
use super::remote::{Collection, Remote, Watch};
use crate::{Epoch, Scope};

/// Events waiting to be taken; the watches wait when it is full.
const INBOX: usize = 256;
/// A server sends a bookmark every minute. A watch that says nothing for longer may have been forgotten by a proxy, and is
/// begun anew where it was.
const LONGEST_SILENCE: Duration = Duration::from_secs(150);

/// Ends with it.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) number: u64,
    /// Of a watch: the server took it.
    pub(super) is_begun: bool,
    handle: AbortHandle,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// Which watch says something.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) area: Scope,
    pub(super) kind: Kind,
    pub(super) number: u64,
    pub(super) since: Instant,
}

#[derive(Debug)]
pub(super) enum News {
    Probed(Result<Epoch, Error>),
    Listed {
        area: Scope,
        number: u64,
        lists: Result<Lists, Error>,
    },
    Leases {
        number: u64,
        asked: Instant,
        listed: Result<(Collection, Listed), Error>,
    },
    Begun(Arc<Origin>),
    /// `None`: the watch came to its end.
    Said(Arc<Origin>, Result<Option<Event>, Error>),
}

#[derive(Debug)]
pub(super) struct Work {
    tasks: JoinSet<()>,
    news: mpsc::Sender<News>,
    inbox: mpsc::Receiver<News>,
    begun: u64,
    is_probing: bool,
}

impl Work {
    pub(super) fn new() -> Work {
        let (news, inbox) = mpsc::channel(INBOX);
        Work { tasks: JoinSet::new(), news, inbox, begun: 0, is_probing: false }
    }

    /// What there is to tell: the first of it, and everything that is waiting behind.
    pub(super) async fn next(&mut self) -> Result<Vec<News>, Error> {
        loop {
            tokio::select! {
                // We hold a sender, so this never ends.
                Some(first) = self.inbox.recv() => {
                    let waiting = std::iter::from_fn(|| self.inbox.try_recv().ok());
                    let all: Vec<News> = std::iter::once(first).chain(waiting.take(INBOX)).collect();
                    self.is_probing &= !all.iter().any(|news| matches!(news, News::Probed(_)));
                    return Ok(all);
                }
                Some(ended) = self.tasks.join_next() => {
                    // Nobody would hear of it any more.
                    if ended.is_err_and(|error| error.is_panic()) {
                        return Err(Error::Broken("a task ended by a defect; please report it".to_owned()));
                    }
                }
            }
        }
    }

    /// Unless the last one is not answered yet.
    pub(super) fn probe<R: Remote>(&mut self, remote: &R) {
        if std::mem::replace(&mut self.is_probing, true) {
            return;
        }
        let (remote, news) = (remote.clone(), self.news.clone());
        // Nobody listens: the task is being ended. So it is below.
        self.tasks.spawn(async move { drop(news.send(News::Probed(remote.probe().await)).await) });
    }

    pub(super) fn list<R: Remote>(&mut self, remote: &R, plan: Arc<Plan>) -> Task {
        let (remote, news, number) = (remote.clone(), self.news.clone(), self.number());
        self.begin(number, async move {
            let lists = plan.read(&remote).await;
            drop(news.send(News::Listed { area: plan.scope.clone(), number, lists }).await);
        })
    }

    pub(super) fn list_leases<R: Remote>(&mut self, remote: &R, what: Collection) -> Task {
        let (remote, news, number) = (remote.clone(), self.news.clone(), self.number());
        self.begin(number, async move {
            let asked = Instant::now();
            let listed = remote.list(&what, None).await.map(|listed| (what, listed));
            drop(news.send(News::Leases { number, asked, listed }).await);
        })
    }

    pub(super) fn watch<R: Remote>(&mut self, remote: &R, what: Collection, from: String) -> Task {
        let (remote, news, number) = (remote.clone(), self.news.clone(), self.number());
        let origin = Arc::new(Origin { area: what.area.clone(), kind: what.kind, number, since: Instant::now() });
        self.begin(number, async move {
            let mut watch = match remote.watch(&what, &from).await {
                Ok(watch) => watch,
                Err(error) => return drop(news.send(News::Said(origin, Err(error))).await),
            };
            let mut goes_on = news.send(News::Begun(origin.clone())).await.is_ok();
            while goes_on {
                let next = timeout(LONGEST_SILENCE, watch.next()).await.unwrap_or(Ok(None));
                goes_on = matches!(next, Ok(Some(_)));
                goes_on &= news.send(News::Said(origin.clone(), next)).await.is_ok();
            }
        })
    }

    fn number(&mut self) -> u64 {
        self.begun += 1;
        self.begun
    }

    fn begin(&mut self, number: u64, task: impl Future<Output = ()> + Send + 'static) -> Task {
        Task { number, is_begun: false, handle: self.tasks.spawn(task) }
    }
}
