use super::super::Owner;
use super::super::fake::TTL;
use super::super::offer::tests::offer;
use super::*;

const HOLD: Hold = Hold { lease: 1, version: 5 };

fn found(epoch: u64) -> Found {
    Found::only(epoch, 9, "10.0.0.9".to_owned())
}

/// One that was written at `now`, with the clock at 100.
fn held(now: Instant) -> Life {
    let mut life = Life::new(TTL, now);
    assert_eq!(life.next(&offer(), Aim::Serve, now), Next::Do(Step::Write));
    life.found_address([10, 0, 0, 1].into());
    let (said, over) = life.claim(&offer(), None, 100, (now, 0.5)).unwrap();
    assert_eq!((said.epoch, over), (100, Over::Version(0)));
    life.written(said, HOLD, Aim::Serve, (now, 0.5));
    life
}

#[tokio::test(start_paused = true)]
async fn what_is_there_is_kept_every_third_of_its_lease_and_written_again_only_when_it_says_something_else() {
    let now = Instant::now();
    let mut life = held(now);
    let third = now + TTL / 3;
    assert_eq!((life.phase(), life.next(&offer(), Aim::Serve, now)), (Phase::Held, Next::Wait(third)));
    let heavier = Offer { weight: 7, ..offer() };
    assert_eq!(life.next(&heavier, Aim::Serve, now), Next::Do(Step::Write));
    // Keeping comes first: it saves everything else.
    assert_eq!(life.next(&heavier, Aim::Serve, third), Next::Do(Step::Keep));
    let (said, over) = life.update(&heavier, Aim::Serve).unwrap();
    assert_eq!((said.weight, said.epoch, over), (7, 100, Over::Own(HOLD)));
    life.written(said, HOLD, Aim::Serve, (now + TTL / 4, 0.5));
    assert_eq!(life.next(&heavier, Aim::Serve, now + TTL / 4), Next::Wait(third), "a write renews no lease");
    life.found_address([10, 0, 0, 2].into());
    assert_eq!(life.next(&heavier, Aim::Serve, now + TTL / 4), Next::Do(Step::Write));
}

#[tokio::test(start_paused = true)]
async fn a_new_life_takes_over_whatever_it_finds_with_a_higher_epoch() {
    let mut life = Life::new(TTL, Instant::now());
    life.found_address([10, 0, 0, 1].into());
    let (said, over) = life.claim(&offer(), Some(&found(7000)), 100, (Instant::now(), 0.5)).unwrap();
    assert_eq!((said.epoch, over), (7001, Over::Version(9)));
    // The answer was lost; what is there now is its own.
    let (said, _) = life.claim(&offer(), Some(&found(7001)), 100, (Instant::now(), 0.5)).unwrap();
    assert_eq!(said.epoch, 7002);
}

#[tokio::test(start_paused = true)]
async fn a_life_that_lost_its_lease_never_replaces_a_later_one_and_comes_back_when_that_has_ended() {
    let now = Instant::now();
    let mut life = held(now);
    life.lost((now, 0.5));
    assert!(matches!(life.next(&offer(), Aim::Serve, now), Next::Wait(_)));
    assert_eq!(life.claim(&offer(), Some(&found(101)), 5000, (now, 0.5)), None);
    assert_eq!(life.phase(), Phase::Superseded);
    assert!(life.error().unwrap().contains("10.0.0.9"), "{:?}", life.error());
    assert_eq!(life.next(&offer(), Aim::Serve, now), Next::Wait(now + TTL / 2));
    let (said, over) = life.claim(&offer(), None, 50, (now, 0.5)).unwrap();
    assert_eq!((said.epoch, over), (101, Over::Version(0)));
}

#[tokio::test(start_paused = true)]
async fn lives_that_ended_are_in_nobodys_way_but_the_next_epoch_is_above_theirs() {
    let now = Instant::now();
    let ended = Found { owner: None, ..found(7000) };
    let mut life = held(now);
    life.lost((now, 0.5));
    let (said, over) = life.claim(&offer(), Some(&ended), 5000, (now, 0.5)).unwrap();
    assert_eq!((said.epoch, over), (7001, Over::Version(9)));
}

#[tokio::test(start_paused = true)]
async fn of_two_lives_that_came_to_one_epoch_the_lesser_is_superseded() {
    let now = Instant::now();
    let tie = |wins_ties| {
        let owner = Owner { epoch: 100, wins_ties, address: "10.0.0.9".to_owned() };
        let mut life = held(now);
        life.lost((now, 0.5));
        life.claim(&offer(), Some(&Found { owner: Some(owner), ..found(100) }), 50, (now, 0.5)).map(|it| it.0.epoch)
    };
    assert_eq!((tie(true), tie(false)), (None, Some(101)));
}

#[tokio::test(start_paused = true)]
async fn failures_change_nothing_until_the_lease_may_have_ended() {
    let now = Instant::now();
    let mut life = held(now);
    let late = now + TTL - Duration::from_millis(1);
    life.failed("away".to_owned(), (late, 0.0));
    assert_eq!((life.phase(), life.error()), (Phase::Held, Some("away")));
    assert!(matches!(life.next(&offer(), Aim::Serve, late), Next::Wait(at) if at > late));
    life.failed("away".to_owned(), (now + TTL, 0.0));
    assert_eq!((life.phase(), life.hold()), (Phase::Registering, None));
}

#[tokio::test(start_paused = true)]
async fn draining_writes_weight_0_first_and_what_is_not_there_is_not_written_to_be_drained() {
    let now = Instant::now();
    let mut life = held(now);
    assert_eq!(life.next(&offer(), Aim::Drain, now), Next::Do(Step::Write));
    let (said, _) = life.update(&offer(), Aim::Drain).unwrap();
    assert_eq!(said.weight, 0);
    life.written(said, HOLD, Aim::Drain, (now, 0.5));
    assert_eq!(life.phase(), Phase::Draining);
    assert!(matches!(life.next(&offer(), Aim::Drain, now), Next::Wait(_)));
    assert_eq!(life.next(&offer(), Aim::Withdraw, now), Next::Do(Step::Withdraw));
    life.lost((now, 0.5));
    assert_eq!(life.next(&offer(), Aim::Drain, now), Next::Over);
    assert_eq!(life.phase(), Phase::Gone);
}
