module meshd-tests/go-verifier

go 1.24
